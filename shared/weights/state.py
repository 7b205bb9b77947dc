"""A policy's weights as bits, for trainer and replica to compare, patch and checksum. No torch, no floats.

A *state* is the tensors of a safetensors file by name, each a flat view of unsigned integers as wide as its elements.
With bits, equal means identical: -0.0 is not 0.0, and a NaN equals itself.

The checksum of a state can be updated from its changes alone (`StateSums`). It hashes names, layouts and the sums of
rows of 64 KiB: of their 32-bit words, each multiplied by an odd number that depends on its place, modulo 2^64.
"""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from shared.errors import WeightStoreError

Bits = NDArray[np.unsignedinteger[Any]]
Sums = NDArray[np.uint64]
Content = bytes | bytearray | memoryview | mmap.mmap

CHECKSUM_FORM = "rows_1:"
_ROW_BYTES, _WORD_BYTES = 1 << 16, 4
_ROW_WORDS = _ROW_BYTES // _WORD_BYTES

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
    """The tensors of a safetensors file, as views into `content`. Raises WeightStoreError if it is not one."""
    try:
        start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
        header: dict[str, Any] = json.loads(bytes(content[_LENGTH_BYTES:start]))
        header.pop("__metadata__", None)
        return {name: _view(content, start, **entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise WeightStoreError(f"{where} is not a readable safetensors file: {exc!r}") from exc


def map_folder(folder: Path) -> dict[str, BitTensor]:
    """The tensors of all safetensors files in a folder. WeightStoreError if there are none, or one can't be read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightStoreError(f"no *.safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in map_state(file).items()}


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
    """The first bytes of a safetensors file, and where each tensor begins in it, in file order."""

    header: bytes
    offsets: dict[str, int]
    num_bytes: int


def lay_out(layouts: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out tensors, given by name as dtype and shape. (The library's own writer would copy all bytes twice.)"""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in sorted(layouts, key=lambda name: -_ITEM_BYTES[layouts[name][0]]):  # keeps each aligned
        dtype, shape = layouts[name]
        end = at + prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(words)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return FileLayout(len(words).to_bytes(_LENGTH_BYTES, "little") + words, offsets, start + at)


def lay_out_files(
    layouts: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], *, max_bytes: int
) -> list[FileLayout]:
    """The same in files of at most `max_bytes` of tensors, or one tensor, each; the order of tensors stays if wider
    dtypes come first."""
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = max_bytes
    for name, (dtype, shape) in layouts.items():
        num_bytes = prod(shape) * _ITEM_BYTES[dtype]
        if num_bytes > room and files[-1]:
            files.append({})
            room = max_bytes
        files[-1][name] = (dtype, shape)
        room -= num_bytes
    return [lay_out(of_file, metadata) for of_file in files]


def write_state(file: Path, state: State, metadata: Mapping[str, str]) -> None:
    layout = lay_out({name: tensor.layout for name, tensor in state.items()}, metadata)
    with file.open("wb") as opened:
        opened.write(layout.header)
        for name in layout.offsets:
            opened.write(np.ascontiguousarray(state[name].bits).data)


@dataclass(frozen=True)
class StateSums:
    layouts: Mapping[str, tuple[str, tuple[int, ...]]]
    rows: Mapping[str, Sums]
    """By tensor: (num_rows,)."""

    @classmethod
    def of(cls, state: State) -> Self:
        layouts = {name: tensor.layout for name, tensor in state.items()}
        return cls(layouts, {name: row_sums(tensor.bits) for name, tensor in state.items()})

    def copy(self) -> "StateSums":
        return StateSums(self.layouts, {name: rows.copy() for name, rows in self.rows.items()})

    def change(self, name: str, indices: NDArray[np.int64], before: Bits, after: Bits) -> None:
        """Follow N changed elements of a tensor, in O(N): indices (N,) into the flattened tensor, ascending, distinct;
        bits (N,) before and after."""
        _add_changes(self.rows[name], indices, before, after)

    @property
    def checksum(self) -> str:
        """Protects against accidents, not attacks: anyone who can write to the store can write any weights."""
        digest = xxhash.xxh3_128()
        for name in sorted(self.rows):
            digest.update(json.dumps([name, *self.layouts[name]]).encode())
            digest.update(self.rows[name].data)
        return f"{CHECKSUM_FORM}{digest.hexdigest()}"


def state_checksum(state: State) -> str:
    """Independent of the order of the tensors."""
    return StateSums.of(state).checksum


def row_sums(bits: Bits) -> Sums:
    """Of one tensor: (num_rows,)."""
    content = np.ascontiguousarray(bits).view(np.uint8)
    num_full = len(content) // _ROW_BYTES
    sums = np.zeros(-(-len(content) // _ROW_BYTES), "<u8")
    words = content[: num_full * _ROW_BYTES].view("<u4").reshape(num_full, _ROW_WORDS)
    np.einsum("ij,j->i", words, _weights(), out=sums[:num_full], dtype=np.uint64, casting="unsafe")
    if num_full < len(sums):
        rest = content[num_full * _ROW_BYTES :].tobytes()
        last = np.frombuffer(rest + bytes(-len(rest) % _WORD_BYTES), "<u4").astype(np.uint64)
        sums[-1] = np.dot(last, _weights()[: len(last)])
    return sums


def _add_changes(sums: Sums, indices: NDArray[np.int64], before: Bits, after: Bits) -> None:
    if not len(indices):
        return
    width = before.itemsize
    if width > _WORD_BYTES:  # two words each
        indices = np.stack([2 * indices, 2 * indices + 1], axis=1).reshape(-1)
        before, after, width = before.view("<u4"), after.view("<u4"), _WORD_BYTES
    per_word = _WORD_BYTES // width
    words, shifts = indices // per_word, (8 * width * (indices % per_word)).astype(np.uint64)
    changes = (after.astype(np.uint64) - before.astype(np.uint64)) << shifts
    changes *= _weights()[words % _ROW_WORDS]
    rows = words // _ROW_WORDS
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))
    sums[rows[firsts]] += np.add.reduceat(changes, firsts)


@cache
def _weights() -> Sums:
    """(_ROW_WORDS,) pseudo-random odd numbers (splitmix64): part of the checksum's form."""
    mixed = np.arange(1, _ROW_WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    weights: Sums = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return weights


def _view(content: Content, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> BitTensor:
    first, end = data_offsets
    item, count = _ITEM_BYTES[dtype], prod(shape)
    if not 0 <= first <= end <= len(content) - start or end - first != count * item:
        raise ValueError(f"shape {shape} of {dtype} does not lie at bytes {first} to {end}")
    return BitTensor(dtype, tuple(shape), np.frombuffer(content, f"<u{item}", count, start + first))
