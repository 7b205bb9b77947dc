"""Small states for the tests of weights."""

from typing import Any

import numpy as np
import torch

from shared.weights.patches import TensorPatch, find_patch
from shared.weights.state import BitTensor, State

_DTYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}


def state_of(**tensors: Any) -> dict[str, BitTensor]:
    """Of arrays of unsigned integers."""
    found = {name: np.asarray(values) for name, values in tensors.items()}
    return {
        name: BitTensor(_DTYPES[values.itemsize], values.shape, values.reshape(-1).copy())
        for name, values in found.items()
    }


def bf16(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.uint16).numpy()


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name].bits, other[name].bits) for name in one)


def find_patches(base: State, new: State) -> list[TensorPatch]:
    """What changed between two whole states, sorted by name."""
    found = (find_patch(name, base[name].bits, new[name].bits) for name in sorted(new))
    return [patch for patch in found if len(patch.indices)]
