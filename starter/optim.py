"""Muon on the matrices, AdamW on embeddings and norms: what trained these models fastest.

Differs from the usual Muon: orthogonalises all matrices of one shape in a single batch, in fp32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_STEPS = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonalise(update: Tensor) -> Tensor:
    """Newton-Schulz on a batch of matrices (n, rows, columns): singular values near one."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in _STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.as_tensor(x.mT if tall else x)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for two-dimensional parameters only."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(updates), strict=True):
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, buffer, momentum)


def build_optimizers(modules: Iterable[nn.Module], *, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW gets `lr`, Muon five times it: its updates have unit singular values."""
    named = [item for module in modules for item in module.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    inside = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in inside]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return [Muon(matrices, lr=5 * lr), adam]
