"""AdamW, clipping and the learning rate of each step. Used by the loop; its state goes into checkpoints."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared.settings import TrainerSettings

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Of update `step` (1 is the first): linear warm-up, then a cosine that reaches its floor at the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class PolicyOptimizer:
    """Weight decay falls on matrices only: norms and biases have nothing to shrink towards."""

    def __init__(self, model: PreTrainedModel, settings: TrainerSettings) -> None:
        self._settings = settings
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            fused=True,
        )

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Scale the gradients to `max_grad_norm` at most; returns their norm before that."""
        return torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)

    def step(self, step: int) -> float:
        """Apply update `step`; returns its learning rate."""
        rate = learning_rate(step, self._settings)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """`{parameter}.{moment}` -> tensor; empty before the first step."""
        return {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._adam.state
            for moment in _MOMENTS
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state`. Raises KeyError if a parameter's moments are missing from non-empty tensors."""
        if not tensors:
            return
        for name, parameter in self._parameters.items():
            self._adam.state[parameter] = {
                moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS
            }
