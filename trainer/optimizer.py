"""AdamW over whole or sharded parameters, and its learning rate. Built by the assembly, used by the loop."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.errors import TrainingError
from shared.settings import TrainerSettings

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class PolicyOptimizer:
    """Weight decay is applied to matrices only, not to norms and biases."""

    def __init__(self, model: nn.Module, settings: TrainerSettings) -> None:
        self._settings = settings
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas, fused=True)

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def clip(self) -> float:
        """Scale the gradients down to `max_grad_norm`; returns their norm before, over all ranks and equal on each."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, step: int) -> float:
        """Apply update `step` (1 is the first); returns its learning rate."""
        rate = learning_rate(step, self._settings)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """`{parameter}.{moment}` -> tensor, sharded as its parameter is. Without parameters that never had a
        gradient."""
        return {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._adam.state
            for moment in MOMENTS
        }

    def empty_state(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Zeros to load `names` into, which are the keys of an earlier `state`. Raises TrainingError if they are not
        the moments of this model's parameters, all or none of each."""
        found = set(names)
        touched = {name for name in self._parameters if f"{name}.{MOMENTS[0]}" in found}
        if odd := found ^ {f"{name}.{moment}" for name in touched for moment in MOMENTS}:
            raise TrainingError(f"moments of another model: {', '.join(sorted(odd)[:3])}")
        parameters = {name: parameter for name, parameter in self._parameters.items() if name in touched}
        return {
            f"{name}.{moment}": torch.zeros((), device=p.device) if moment == "step" else torch.zeros_like(p).detach()
            for name, p in parameters.items()
            for moment in MOMENTS
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state`."""
        for name, parameter in self._parameters.items():
            if f"{name}.{MOMENTS[0]}" in tensors:
                self._adam.state[parameter] = {moment: tensors[f"{name}.{moment}"] for moment in MOMENTS}


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Linear warm-up, then a cosine that reaches its floor at the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
