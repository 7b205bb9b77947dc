"""Reads a weight version's safetensors files and validates them against a model before anything changes.

`read_weights` and `read_patches` may run on any thread (they read names, shapes and dtypes only);
`apply_weights` and `apply_patches` must run on the thread that owns the model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from shared.errors import EngineError
from shared.weights.checkpoint_names import checkpoint_layouts, keeps_other_names


def read_weights(module: Any, folder: Path) -> dict[str, Tensor]:
    """All tensors of `folder`, mapped from disk. EngineError names the first one that does not fit."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise EngineError(f"no *.safetensors file in {folder}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError, ValueError) as exc:
            raise EngineError(f"{file} is not a readable safetensors file: {exc}") from exc
    own = _own_tensors(module)
    for name, tensor in tensors.items():
        _check_fit(own, name, tuple(tensor.shape), tensor, str(folder))
    # Tied names share one parameter: one of them is enough.
    written = {id(own[name]) for name in tensors}
    if missing := [name for name, tensor in own.items() if id(tensor) not in written]:
        raise EngineError(f"{folder}: {len(missing)} of the model's tensors are missing, such as {missing[0]!r}")
    return tensors


def in_memory(module: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the names in memory. Where those are not the checkpoint's, a second model is loaded for a moment."""
    if not keeps_other_names(module):
        return tensors
    loaded = type(module).from_pretrained(None, config=module.config, state_dict=tensors, dtype=module.dtype)
    found: dict[str, Tensor] = loaded.state_dict()
    return found


@torch.no_grad()
def apply_weights(module: Any, tensors: dict[str, Tensor]) -> None:
    """Copy into the model's own storage; its dtype stays."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


@dataclass(frozen=True)
class Patch:
    name: str
    shape: tuple[int, ...]
    indices: Tensor
    """(N,) int64 into the flattened tensor, ascending, distinct."""
    values: Tensor


def read_patches(file: Path, *, module: Any = None) -> list[Patch]:
    """Read a file in the form of `PatchableEngine.patch_weights`. EngineError if it is in another form.

    Checked against the model `module`, if there is one; EngineError names the first patch that does not fit.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            shapes: dict[str, list[int]] = json.loads((opened.metadata() or {})["shapes"])
        patches = [
            Patch(name, tuple(shape), tensors[f"{name}.indices"], tensors[f"{name}.values"])
            for name, shape in shapes.items()
        ]
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise EngineError(f"{file} does not hold readable patches: {exc!r}") from exc
    for patch in patches:
        _check_indices(patch, file)
    if module is not None:
        own = _own_tensors(module)
        for patch in patches:
            _check_fit(own, patch.name, patch.shape, patch.values, "the patch")
    return patches


@torch.no_grad()
def apply_patches(module: Any, patches: Sequence[Patch]) -> None:
    """Write the changed elements into the model's own storage; its dtype stays."""
    own = module.state_dict()
    for patch in patches:
        tensor = own[patch.name]
        # put_ takes flat indices whatever the strides are
        tensor.put_(patch.indices.to(tensor.device), patch.values.to(tensor.device, tensor.dtype))


def _own_tensors(module: Any) -> dict[str, Tensor]:
    """By the checkpoint's names; without values where a model keeps other ones in memory."""
    if not keeps_other_names(module):
        own: dict[str, Tensor] = module.state_dict(keep_vars=True)
        return own
    layouts = checkpoint_layouts(module)
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layouts.items()}


def _check_indices(patch: Patch, file: Path) -> None:
    count = torch.Size(patch.shape).numel()
    indices = patch.indices
    if indices.dtype != torch.int64 or indices.ndim != 1 or indices.shape != patch.values.shape:
        raise EngineError(f"{file}: the indices of {patch.name} are not int64, one per value")
    if len(indices) and (int(indices[0]) < 0 or int(indices[-1]) >= count or not bool((indices.diff() > 0).all())):
        raise EngineError(f"{file}: the indices of {patch.name} do not ascend within its {count} elements")


def _check_fit(own: dict[str, Tensor], name: str, shape: tuple[int, ...], values: Tensor, where: str) -> None:
    if name not in own:
        raise EngineError(f"{where}: the model has no tensor {name!r}")
    if shape != tuple(own[name].shape):
        raise EngineError(f"{where}: {name} has shape {shape}, the model's is {tuple(own[name].shape)}")
    if values.is_floating_point() != own[name].is_floating_point():
        raise EngineError(f"{where}: {name} has dtype {values.dtype}, the model's is {own[name].dtype}")
    if not bool(torch.isfinite(values).all()):
        raise EngineError(f"{where}: {name} holds NaN or infinite values")
