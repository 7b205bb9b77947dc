"""The losses: from suffix log-probs to a sum over one micro-batch. Called by the loop.

They return sums, not means: the loop divides by the count over the *whole* step (`normaliser`), so the split into
micro-batches does not change the update.

DPO (arXiv 2305.18290, equation 7), per pair with prefix x, chosen y_w, rejected y_l:

    -log sigmoid(beta * [(log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))])

divided by the number of pairs in the step. log pi(y|x) is summed over the suffix tokens in fp32. No label smoothing, no
length normalisation. The paper (2601.21343) does not state beta.

NLL (RF-NLL, SFT, next token), per chosen suffix: -log pi(y|x), divided by the number of suffix tokens in the step, so
every token weighs the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shared.objectives import OBJECTIVES
from shared.settings import TrainerSettings
from trainer.preferences import Preference


@dataclass(frozen=True)
class LossTerms:
    """Sums over one micro-batch."""

    loss_sum: Tensor
    """Scalar with gradient."""
    figures: dict[str, Tensor]
    """Figure name -> scalar sum over the pairs, detached; the loop divides by the number of pairs."""


class Loss(Protocol):
    @property
    def needs_reference(self) -> bool: ...

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        """The step's count: of pairs (DPO) or of suffix tokens (NLL)."""

    def terms(self, log_probs: Tensor, reference: Tensor | None) -> LossTerms:
        """`log_probs` and `reference` (M,) in the order of a Pass: the chosen suffixes, then the rejected ones."""


@dataclass(frozen=True)
class Dpo:
    beta: float
    needs_reference: bool = True

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        return len(pairs)

    def terms(self, log_probs: Tensor, reference: Tensor | None) -> LossTerms:
        assert reference is not None
        chosen, rejected = log_probs.chunk(2)  # (P,) each
        reference_chosen, reference_rejected = reference.chunk(2)
        margins = self.beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
        figures = {
            "reward_margin": margins,
            "reward_accuracy": (margins > 0).float(),
            "chosen_log_prob": chosen,
            "rejected_log_prob": rejected,
            "reference_chosen_log_prob": reference_chosen,
            "reference_rejected_log_prob": reference_rejected,
        }
        return LossTerms(-functional.logsigmoid(margins).sum(), _summed(figures))


@dataclass(frozen=True)
class Nll:
    needs_reference: bool = False

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        return sum(len(pair.chosen.token_ids) for pair in pairs)

    def terms(self, log_probs: Tensor, reference: Tensor | None) -> LossTerms:
        return LossTerms(-log_probs.sum(), _summed({"chosen_log_prob": log_probs}))


LOSSES: dict[str, Callable[[TrainerSettings], Loss]] = {"dpo": lambda one: Dpo(one.beta), "nll": lambda _: Nll()}


def build_loss(settings: TrainerSettings) -> Loss:
    return LOSSES[OBJECTIVES[settings.objective].loss](settings)


def _summed(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.detach().sum(dtype=torch.float64) for name, values in figures.items()}
