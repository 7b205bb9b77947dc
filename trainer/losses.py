"""The losses: from the log-probs of suffixes to a sum over one pass. Called by the loop.

They return sums, not means: the loop divides by the count over the *whole* step and all ranks (`normaliser`), so the
split into passes and ranks does not change the update. log pi(y|x) is the sum over the suffix tokens, in fp32.

DPO (arXiv 2305.18290, equation 7), per pair with prefix x, chosen y_w, rejected y_l, divided by the number of pairs:

    ratio(y) = log pi(y|x) - log ref(y|x),  d = ratio(y_w) - ratio(y_l)
    -log sigmoid(beta * d)

The paper (2601.21343) does not state beta. Its DPO has none of these options, which are off by default:

    length_normalised   ratio(y) / |y| in d: log-probs are averaged over tokens (Tulu 3, arXiv 2411.15124)
    label_smoothing     -(1 - e) log sigmoid(beta * d) - e log sigmoid(-beta * d)
                        (conservative DPO, equation 3 of ericmitchell.ai/cdpo.pdf; not the "robust" DPO of 2403.00409)
    dpo_loss = "ipo"    (d - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17), always with ratio(y) / |y|: the equation
                        sums, TRL averages and says that its authors do too
    nll_weight          + nll_weight * -log pi(y_w|x) / |y_w| (arXiv 2404.19733). Per suffix, so that the
                        number of pairs normalises all of it. TRL's `sft` averages over the tokens of a batch instead;
                        the two are equal when the chosen suffixes have equal lengths

NLL (RF-NLL, SFT, next token), per chosen suffix: -log pi(y|x), divided by the number of suffix tokens in the step, so
every token weighs the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from shared.objectives import OBJECTIVES
from shared.settings import TrainerSettings
from trainer.preferences import Preference


@dataclass(frozen=True)
class LossTerms:
    """Sums over one pass."""

    loss_sum: Tensor
    """Scalar with gradient."""
    figures: dict[str, Tensor]
    """Figure name -> scalar sum over the pairs, detached; the loop divides by the number of pairs."""


class Loss(Protocol):
    @property
    def needs_reference(self) -> bool: ...

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        """The step's count: of pairs (DPO) or of suffix tokens (NLL)."""

    def terms(self, log_probs: Tensor, reference: Tensor | None, num_targets: Tensor) -> LossTerms:
        """`log_probs`, `reference` and `num_targets` (M,) as in Pass: chosen suffixes first, then rejected ones."""


@dataclass(frozen=True)
class Dpo:
    beta: float
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False
    nll_weight: float = 0.0
    needs_reference: bool = True

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        return len(pairs)

    def terms(self, log_probs: Tensor, reference: Tensor | None, num_targets: Tensor) -> LossTerms:
        assert reference is not None
        chosen, rejected = log_probs.chunk(2)  # (P,) each
        reference_chosen, reference_rejected = reference.chunk(2)
        ratios = log_probs - reference
        if self.length_normalised or self.form == "ipo":
            ratios = ratios / num_targets
        better, worse = ratios.chunk(2)
        margins = self.beta * (better - worse)
        losses = self._losses(margins)
        figures = {
            "reward_margin": margins,
            "reward_accuracy": (margins > 0).float(),
            "chosen_log_prob": chosen,
            "rejected_log_prob": rejected,
            "reference_chosen_log_prob": reference_chosen,
            "reference_rejected_log_prob": reference_rejected,
        }
        if self.nll_weight:
            figures["chosen_nll"] = -chosen / num_targets[: len(chosen)]
            losses = losses + self.nll_weight * figures["chosen_nll"]
        return LossTerms(losses.sum(dtype=torch.float32), _summed(figures))

    def _losses(self, margins: Tensor) -> Tensor:
        """(P,) from margins beta * d."""
        if self.form == "ipo":
            return (margins / self.beta - 1 / (2 * self.beta)) ** 2
        losses = -functional.logsigmoid(margins)
        if self.label_smoothing:
            flipped = -functional.logsigmoid(-margins)
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * flipped
        return losses


@dataclass(frozen=True)
class Nll:
    needs_reference: bool = False

    def normaliser(self, pairs: Sequence[Preference]) -> int:
        return sum(len(pair.chosen.token_ids) for pair in pairs)

    def terms(self, log_probs: Tensor, reference: Tensor | None, num_targets: Tensor) -> LossTerms:
        return LossTerms(-log_probs.sum(dtype=torch.float32), _summed({"chosen_log_prob": log_probs}))


def _dpo(settings: TrainerSettings) -> Loss:
    return Dpo(
        settings.beta,
        form=settings.dpo_loss,
        label_smoothing=settings.label_smoothing,
        length_normalised=settings.length_normalised,
        nll_weight=settings.nll_weight,
    )


LOSSES: dict[str, Callable[[TrainerSettings], Loss]] = {"dpo": _dpo, "nll": lambda _: Nll()}


def build_loss(settings: TrainerSettings) -> Loss:
    return LOSSES[OBJECTIVES[settings.objective].loss](settings)


def _summed(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.detach().sum(dtype=torch.float64) for name, values in figures.items()}
