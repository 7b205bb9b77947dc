"""Which token a row picks, and the random numbers it picks by."""

import pytest
import torch

from services.engine.hf.decode import RowSampling, draw_uniforms


def row_sampling(*rows: tuple[float, float, float]) -> RowSampling:
    """From (temperature, top_p, uniform) of each row."""
    return RowSampling(
        temperature=torch.tensor([row[0] for row in rows]),
        top_p=torch.tensor([row[1] for row in rows]),
        uniforms=torch.tensor([[row[2]] for row in rows]),
        any_random=any(row[0] > 0 for row in rows),
        any_nucleus=any(row[1] < 1 for row in rows),
    )


LOGITS = torch.tensor([0.2, 0.5, 0.3]).log()


@pytest.mark.parametrize(
    ("temperature", "top_p", "uniform", "token"),
    [
        (1.0, 1.0, 0.19, 0),
        (1.0, 1.0, 0.21, 1),
        (1.0, 1.0, 0.69, 1),
        (1.0, 1.0, 0.71, 2),
        (0.0, 1.0, 0.99, 1),
        # Of 0.5 and 0.3 the first takes 0.625 of the mass; the 0.2 is cut off.
        (1.0, 0.6, 0.0, 1),
        (1.0, 0.6, 0.62, 1),
        (1.0, 0.6, 0.63, 2),
        (1.0, 0.4, 0.99, 1),
        # Probabilities squared: 0.04, 0.25, 0.09 of 0.38.
        (0.5, 1.0, 0.10, 0),
        (0.5, 1.0, 0.11, 1),
        (0.5, 1.0, 0.77, 2),
    ],
)
def test_a_token_is_where_the_number_falls(temperature: float, top_p: float, uniform: float, token: int) -> None:
    sampling = row_sampling((temperature, top_p, uniform), (1.0, 1.0, 0.5), (0.7, 0.5, 0.5))
    assert sampling.pick(LOGITS.expand(3, 3), step=0)[0] == token


def test_randomness_depends_on_seed_and_sample_and_grows_at_its_end() -> None:
    assert list(draw_uniforms(1, 0, 4)) == list(draw_uniforms(1, 0, 9)[:4])
    assert draw_uniforms(1, 0, 1) != draw_uniforms(2, 0, 1)
    assert draw_uniforms(1, 0, 1) != draw_uniforms(1, 1, 1)
    numbers = draw_uniforms(3, 0, 10_000)
    assert numbers.mean() == pytest.approx(0.5, abs=0.02)
    assert numbers.min() >= 0
    assert numbers.max() < 1
