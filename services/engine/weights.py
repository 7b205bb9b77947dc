"""Reads a weight version's safetensors files and holds them against a model before anything changes.

`read_weights` may run on any thread (it only looks at the model's names and shapes); `apply_weights` belongs to the
thread that owns the model.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import EngineError


def read_weights(module: Any, folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`, mapped from disk. Raises EngineError naming the first thing that doesn't fit."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(f"no *.safetensors file in {folder}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as exc:
            raise EngineError(f"{file} is not a readable safetensors file: {exc}") from exc
    _check(module.state_dict(), tensors, folder)
    return tensors


@torch.no_grad()
def apply_weights(module: Any, tensors: dict[str, Tensor]) -> None:
    """Copy into the model's own storage; its dtype stays."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _check(own: dict[str, Tensor], given: dict[str, Tensor], folder: Path) -> None:
    for name, tensor in given.items():
        if name not in own:
            raise EngineError(f"{folder}: the model has no tensor {name!r}")
        if tensor.shape != own[name].shape:
            raise EngineError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            )
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise EngineError(f"{folder}: {name} has dtype {tensor.dtype}, the model's is {own[name].dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise EngineError(f"{folder}: {name} holds NaN or infinite values")
    # Tied tensors share storage: one of their names is enough.
    written = {own[name].data_ptr() for name in given}
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in written]
    if missing:
        raise EngineError(f"{folder}: {len(missing)} of the model's tensors are missing, such as {missing[0]!r}")
