import math
import re
from pathlib import Path

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
# margins at beta 0.5: 0.5 * ((-1 + 1.5) - (-3 + 2)) = 0.75 and 0.5 * ((-2 + 1) - (-2.5 + 2.5)) = -0.5


def policy_log_probs() -> Tensor:
    return torch.tensor([-1.0, -2.0, -3.0, -2.5], requires_grad=True)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_at_equal_log_probs_is_ln_2_per_pair() -> None:
    log_probs = policy_log_probs()
    assert Dpo(0.1).terms(log_probs, log_probs.detach()).loss_sum.item() == pytest.approx(2 * math.log(2))


def test_dpo_loss_and_gradient_by_hand() -> None:
    log_probs = policy_log_probs()
    loss = Dpo(0.5).terms(log_probs, torch.tensor(REFERENCE)).loss_sum
    loss.backward()  # type: ignore[no-untyped-call]
    first, second = 0.5 * (1 - sigmoid(0.75)), 0.5 * (1 - sigmoid(-0.5))
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.75)) - math.log(sigmoid(-0.5)))
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-first, -second, first, second])


def test_dpo_figures_are_sums_over_pairs() -> None:
    figures = Dpo(0.5).terms(policy_log_probs(), torch.tensor(REFERENCE)).figures
    expected = {"reward_margin": 0.25, "reward_accuracy": 1.0, "chosen_log_prob": -3.0, "rejected_log_prob": -5.5}
    expected |= {"reference_chosen_log_prob": -2.5, "reference_rejected_log_prob": -4.5}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def test_nll_loss_and_gradient_by_hand() -> None:
    log_probs = torch.tensor([-1.0, -4.0], requires_grad=True)
    loss = Nll().terms(log_probs, None).loss_sum
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 5.0
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [-1.0, -1.0]


def test_dpo_counts_pairs_and_nll_counts_chosen_tokens() -> None:
    long, short = candidate("original", 1, 2, 3), candidate("rewrite", 4)
    pairs = [Preference("0.0.0.0", (1, 2), 2, chosen, None, None) for chosen in (long, short)]
    assert (Dpo(0.1).normaliser(pairs), Nll().normaliser(pairs)) == (2, 4)


def test_every_objective_has_its_functions_and_every_function_is_used() -> None:
    assert {row.choice for row in OBJECTIVES.values()} == CHOICES.keys()
    assert {row.loss for row in OBJECTIVES.values()} == LOSSES.keys()
    assert build_loss(TrainerSettings(objective="dpo_rewrite_over_rollout", beta=0.3)) == Dpo(0.3)
    assert build_loss(TrainerSettings(objective="rf_nll")) == Nll()


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
