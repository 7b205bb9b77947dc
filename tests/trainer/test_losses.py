import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.configuration import load_settings
from shared.errors import SettingsError
from shared.objectives import OBJECTIVES
from shared.settings import TrainerSettings
from tests.trainer.windows import candidate
from trainer.losses import LOSSES, Dpo, Nll, build_loss
from trainer.preferences import CHOICES, Preference

# Two pairs: chosen -1.0, -2.0; rejected -3.0, -2.5; reference chosen -1.5, -1.0; reference rejected -2.0, -2.5
REFERENCE = [-1.5, -1.0, -2.0, -2.5]
NUM_TARGETS = torch.tensor([2, 4, 4, 2])
# margins at beta 0.5: 0.5 * ((-1 + 1.5) - (-3 + 2)) = 0.75 and 0.5 * ((-2 + 1) - (-2.5 + 2.5)) = -0.5


def policy_log_probs() -> Tensor:
    return torch.tensor([-1.0, -2.0, -3.0, -2.5], requires_grad=True)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_at_equal_log_probs_is_ln_2_per_pair() -> None:
    log_probs = policy_log_probs()
    assert Dpo(0.1).terms(log_probs, log_probs.detach(), NUM_TARGETS).loss_sum.item() == pytest.approx(2 * math.log(2))


def test_dpo_loss_and_gradient_by_hand() -> None:
    log_probs = policy_log_probs()
    loss = Dpo(0.5).terms(log_probs, torch.tensor(REFERENCE), NUM_TARGETS).loss_sum
    loss.backward()  # type: ignore[no-untyped-call]
    first, second = 0.5 * (1 - sigmoid(0.75)), 0.5 * (1 - sigmoid(-0.5))
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.75)) - math.log(sigmoid(-0.5)))
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-first, -second, first, second])


def test_dpo_figures_are_sums_over_pairs() -> None:
    figures = Dpo(0.5).terms(policy_log_probs(), torch.tensor(REFERENCE), NUM_TARGETS).figures
    expected = {"reward_margin": 0.25, "reward_accuracy": 1.0, "chosen_log_prob": -3.0, "rejected_log_prob": -5.5}
    expected |= {"reference_chosen_log_prob": -2.5, "reference_rejected_log_prob": -4.5}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def loss_of(loss: Dpo) -> float:
    return loss.terms(policy_log_probs(), torch.tensor(REFERENCE), NUM_TARGETS).loss_sum.item()


def test_label_smoothing_takes_a_share_of_the_preferences_for_wrong() -> None:
    right = -math.log(sigmoid(0.75)) - math.log(sigmoid(-0.5))
    wrong = -math.log(sigmoid(-0.75)) - math.log(sigmoid(0.5))
    assert loss_of(Dpo(0.5, label_smoothing=0.2)) == pytest.approx(0.8 * right + 0.2 * wrong)


def test_length_normalised_log_probs_are_per_token() -> None:
    # 0.5 * (0.5 / 2 - -1 / 4) = 0.25 and 0.5 * (-1 / 4 - 0 / 2) = -0.125
    expected = -math.log(sigmoid(0.25)) - math.log(sigmoid(-0.125))
    assert loss_of(Dpo(0.5, length_normalised=True)) == pytest.approx(expected)


def test_ipo_draws_the_difference_per_token_to_half_of_one_over_beta() -> None:
    # differences per token 0.5 and -0.25, both drawn to 1 / (2 * 0.5) = 1
    assert loss_of(Dpo(0.5, form="ipo")) == pytest.approx((0.5 - 1) ** 2 + (-0.25 - 1) ** 2)


def test_nll_beside_dpo_is_per_token_of_each_chosen_suffix() -> None:
    terms = Dpo(0.5, nll_weight=3.0).terms(policy_log_probs(), torch.tensor(REFERENCE), NUM_TARGETS)
    nll = 1.0 / 2 + 2.0 / 4
    assert terms.loss_sum.item() == pytest.approx(loss_of(Dpo(0.5)) + 3.0 * nll)
    assert terms.figures["chosen_nll"].item() == pytest.approx(nll)


@pytest.mark.parametrize(
    "loss", [Dpo(0.5, form="ipo", nll_weight=0.5), Dpo(0.5, label_smoothing=0.1, length_normalised=True, nll_weight=2)]
)
def test_the_split_into_passes_changes_neither_loss_nor_gradient(loss: Dpo) -> None:
    together, apart = policy_log_probs(), policy_log_probs()
    whole = loss.terms(together, torch.tensor(REFERENCE), NUM_TARGETS).loss_sum
    parts = [
        loss.terms(apart[places], torch.tensor(REFERENCE)[places], NUM_TARGETS[places]).loss_sum
        for places in ([0, 2], [1, 3])
    ]
    assert whole.item() == pytest.approx(parts[0].item() + parts[1].item())
    for one in (whole, *parts):
        one.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(together.grad, apart.grad)


def test_sums_are_single_precision_whatever_the_model_computes_in() -> None:
    log_probs, reference = policy_log_probs().bfloat16(), torch.tensor(REFERENCE).bfloat16()
    for loss in (Dpo(0.5, nll_weight=1.0), Nll()):
        assert loss.terms(log_probs, reference, NUM_TARGETS).loss_sum.dtype == torch.float32


def test_nll_loss_and_gradient_by_hand() -> None:
    log_probs = torch.tensor([-1.0, -4.0], requires_grad=True)
    loss = Nll().terms(log_probs, None, torch.tensor([1, 2])).loss_sum
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 5.0
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, -1.0]


def test_dpo_counts_pairs_and_nll_counts_chosen_tokens() -> None:
    long, short = candidate("original", 1, 2, 3), candidate("rewrite", 4)
    pairs = [Preference("0.0.0.0", (1, 2), 2, chosen, None) for chosen in (long, short)]
    assert (Dpo(0.1).normaliser(pairs), Nll().normaliser(pairs)) == (2, 4)


def test_every_objective_has_its_functions_and_every_function_is_used() -> None:
    assert {row.choice for row in OBJECTIVES.values()} == CHOICES.keys()
    assert {row.loss for row in OBJECTIVES.values()} == LOSSES.keys()
    assert build_loss(TrainerSettings(objective="dpo_rewrite_over_rollout", beta=0.3)) == Dpo(0.3)
    assert build_loss(TrainerSettings(objective="rf_nll")) == Nll()


def test_the_options_of_dpo_reach_the_loss() -> None:
    settings = TrainerSettings(beta=5.0, label_smoothing=0.1, length_normalised=True, nll_weight=1.0)
    assert build_loss(settings) == Dpo(5.0, label_smoothing=0.1, length_normalised=True, nll_weight=1.0)
    assert build_loss(TrainerSettings(dpo_loss="ipo")) == Dpo(0.1, form="ipo")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"objective": "rf_nll", "nll_weight": 1.0},
            "'rf_nll' trains by NLL, which has no nll_weight",
        ),
        ({"objective": "next_token", "dpo_loss": "ipo"}, "has no dpo_loss"),
        ({"dpo_loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning with dpo_loss = 'ipo'"),
        ({"dpo_loss": "ipo", "length_normalised": True}, "averages log-probs over tokens in any case"),
        ({"profile_steps": (25, 20)}, r"profile_steps = \[25, 20\] ends before it begins"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainerSettings(**options)


def test_the_documentation_has_the_table_of_objectives() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(\w+)` \|.*\| (DPO|NLL) \| (.*) \|$", page, flags=re.MULTILINE)
    needs = {name: {"judge"} if row.judged else row.kinds for name, row in OBJECTIVES.items()}
    assert {name: (loss.lower(), set(needed.split(", "))) for name, loss, needed in table} == {
        name: (row.loss, needs[name]) for name, row in OBJECTIVES.items()
    }


def test_an_unknown_objective_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"trainer\.objective.*no objective is called 'dpoo': choose one of dpo"):
        load_settings(None, ["--trainer.objective", "dpoo"], {})
