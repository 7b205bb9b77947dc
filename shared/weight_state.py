"""A policy's weights as bits: what trainer and replica compare, patch and take checksums of. No torch, no floats.

Both hold a safetensors file (the trainer in memory, the replica mapped from its disk); a *state* is its tensors by
name, each a flat view of unsigned integers as wide as its elements. Bits, not numbers, because equal means
equal to the last one: -0.0 is not 0.0 here, and a NaN equals itself.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.errors import WeightStoreError

Bits = NDArray[np.unsignedinteger[Any]]

_LENGTH_BYTES = 8
"""A safetensors file: the header's length (little-endian), the header (JSON), the tensors' bytes."""
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True)
class BitTensor:
    """One tensor's bits."""

    dtype: str
    """As safetensors names it, such as BF16."""
    shape: tuple[int, ...]
    bits: Bits
    """(N,) u1, u2, u4 or u8, in the order of the flattened tensor."""

    @property
    def layout(self) -> tuple[str, tuple[int, ...]]:
        return self.dtype, self.shape


State = Mapping[str, BitTensor]


def parse_state(content: bytes | memoryview | mmap.mmap, *, where: str) -> dict[str, BitTensor]:
    """The tensors of a safetensors file, as views into `content`. WeightStoreError if it is not one."""
    try:
        start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        header: dict[str, Any] = json.loads(bytes(content[_LENGTH_BYTES:start]))
        header.pop("__metadata__", None)
        return {name: _view(content, start, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightStoreError(f"{where} is not a readable safetensors file: {exc!r}") from exc


def map_state(file: Path) -> dict[str, BitTensor]:
    """The tensors of a safetensors file on disk. The mapping lives as long as the views do."""
    try:
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:  # ValueError: an empty file can't be mapped
        raise WeightStoreError(f"{file} can't be read: {exc}") from exc
    return parse_state(mapped, where=str(file))


def write_state(file: Path, state: State, metadata: Mapping[str, str]) -> None:
    """A safetensors file of these tensors. (The library's own writer of raw bytes changes with its minor versions.)"""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(state, key=lambda name: -state[name].bits.itemsize)  # so that each tensor lies aligned
    at = 0
    for name in ordered:
        tensor = state[name]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.bits.nbytes]}
        at += tensor.bits.nbytes
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _LENGTH_BYTES)
    with file.open("wb") as opened:
        opened.write(len(words).to_bytes(_LENGTH_BYTES, "little") + words)
        for name in ordered:
            opened.write(np.ascontiguousarray(state[name].bits).data)


def state_checksum(state: State) -> str:
    """128 bits of XXH3 over names, dtypes, shapes and bits, in the order of the names.

    It guards against accidents at the speed of memory, not against an author of manifests with bad intentions: who can
    write to the store can write any weights.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name]
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        digest.update(np.ascontiguousarray(tensor.bits).data)
    return f"xxh3_128:{digest.hexdigest()}"


def _view(
    content: bytes | memoryview | mmap.mmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]
) -> BitTensor:
    first, end = data_offsets
    item, count = _ITEM_BYTES[dtype], prod(shape)
    if not 0 <= first <= end <= len(content) - start or end - first != count * item:
        raise ValueError(f"shape {shape} of {dtype} does not lie at bytes {first} to {end}")
    return BitTensor(dtype, tuple(shape), np.frombuffer(content, f"<u{item}", count, start + first))
