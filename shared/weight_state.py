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
Content = bytes | bytearray | memoryview | mmap.mmap

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


def parse_state(content: Content, *, where: str) -> dict[str, BitTensor]:
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


@dataclass(frozen=True)
class FileLayout:
    """Where the tensors of a safetensors file lie."""

    header: bytes
    """Its length included: the file begins with it."""
    offsets: dict[str, int]
    """Of the tensors' first bytes, from the file's beginning, in the order in which they lie."""
    num_bytes: int


def lay_out(layouts: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> FileLayout:
    """Of tensors by name, with dtype and shape. (The library's own writer would copy all bytes twice.)"""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in sorted(layouts, key=lambda name: -_ITEM_BYTES[layouts[name][0]]):  # so that each lies aligned
        dtype, shape = layouts[name]
        end = at + prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(words)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return FileLayout(len(words).to_bytes(_LENGTH_BYTES, "little") + words, offsets, start + at)


def write_state(file: Path, state: State, metadata: Mapping[str, str]) -> None:
    """A safetensors file of these tensors."""
    layout = lay_out({name: tensor.layout for name, tensor in state.items()}, metadata)
    with file.open("wb") as opened:
        opened.write(layout.header)
        for name in layout.offsets:
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
    content: Content,
    start: int,
    *,
    dtype: str,
    shape: list[int],
    data_offsets: list[int],
) -> BitTensor:
    first, end = data_offsets
    item, count = _ITEM_BYTES[dtype], prod(shape)
    if not 0 <= first <= end <= len(content) - start or end - first != count * item:
        raise ValueError(f"shape {shape} of {dtype} does not lie at bytes {first} to {end}")
    return BitTensor(dtype, tuple(shape), np.frombuffer(content, f"<u{item}", count, start + first))
