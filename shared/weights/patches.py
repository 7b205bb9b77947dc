"""The sparse form of a weight version: the elements whose bits changed since its base, and nothing else. Lossless.

    PREFIX | zstd( length of the header | header (JSON) | index planes | change planes )

Steps of AdamW at small rates leave most bfloat16 elements as they were, and move the others mostly by one unit in
the last place. So an index is stored as its distance from the one before, and a value as the difference of its bits,
taken as an unsigned integer, from the base's, modulo 2^width: exact for every pattern of bits, NaNs and negative
zeros included, and nearly always +1 or -1. Integers are laid in planes (all lowest bytes, then all next ones, ...),
which is what lets an entropy coder see how small they are.

A difference says nothing without its base. The manifest names the base and has checksums of the resulting state and of
the changed elements; whoever applies patches compares both (services/rollout/held_weights.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from shared.errors import WeightStoreError
from shared.weights.state import Bits, State, StateSums

PREFIX = b"headwater-sparse-1\n"
_ZSTD_LEVEL = 3
_LENGTH_BYTES = 4
_MAX_HEADER_BYTES = 1 << 26
_WIDTHS = (1, 2, 4, 8)

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class TensorPatch:
    """What changed in one tensor."""

    name: str
    indices: Indices
    """(N,) into the flattened tensor, ascending, distinct."""
    changes: Bits
    """(N,) to be added to the base's bits, modulo 2^width."""


@dataclass(frozen=True)
class _Entry:
    """A changed tensor as the header lists it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int


def find_patches(base: State, new: State) -> list[TensorPatch]:
    """The changed tensors in the order of their names; both states must have the same names, dtypes and shapes."""
    if {name: tensor.layout for name, tensor in base.items()} != {name: tensor.layout for name, tensor in new.items()}:
        raise ValueError("states of different names, dtypes or shapes have no sparse difference")
    patches = []
    for name in sorted(new):
        before, after = base[name].bits, new[name].bits
        indices = np.flatnonzero(before != after)
        if len(indices):
            patches.append(TensorPatch(name, indices, after[indices] - before[indices]))
    return patches


def apply_patches(state: State, patches: Sequence[TensorPatch]) -> None:
    """Change the bits of `state`, which must be writable and the state that `patches` were found against."""
    for patch in patches:
        state[patch.name].bits[patch.indices] += patch.changes


def foresee(sums: StateSums, patches: Sequence[TensorPatch], base: State) -> tuple[StateSums, str]:
    """What `base`, of which `sums` are, will be once `patches` are applied: its sums, and the checksum of the changed
    elements alone. The sums tell whether the changes fit the base that the sums are of; the checksum, whether the bits
    that lie in memory are still those of that base."""
    changes = {}
    digest = xxhash.xxh3_128()
    for patch in patches:
        before = base[patch.name].bits[patch.indices]
        after = before + patch.changes
        changes[patch.name] = (patch.indices, before, after)
        digest.update(after.data)
    return sums.changed(changes), f"xxh3_128:{digest.hexdigest()}"


def encode_patches(patches: Sequence[TensorPatch], base: State) -> bytes:
    """One file."""
    header = [[patch.name, *base[patch.name].layout, len(patch.indices)] for patch in patches]
    gaps = _joined([_gaps(patch.indices) for patch in patches], np.dtype("<u8"))
    index_width = next(width for width in _WIDTHS if int(gaps.max(initial=0)) < 1 << (8 * width))
    words = json.dumps({"index_width": index_width, "tensors": header}).encode()
    pieces = [len(words).to_bytes(_LENGTH_BYTES, "little"), words, _planes(gaps.astype(f"<u{index_width}"))]
    for width in _WIDTHS:
        of_width = [_zigzag(patch.changes) for patch in patches if patch.changes.itemsize == width]
        pieces.append(_planes(_joined(of_width, np.dtype(f"<u{width}"))))
    return PREFIX + zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(b"".join(pieces))


def decode_patches(content: bytes, base: State, *, where: str) -> list[TensorPatch]:
    """Read a file and hold it against its base. WeightStoreError naming the first thing that doesn't fit."""
    payload = memoryview(_decompress(content, base, where))
    start = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    index_width, entries = _read_header(bytes(payload[_LENGTH_BYTES:start]), where)
    for entry in entries:
        _check_entry(entry, base, where)
    cursor = _Cursor(payload, start, where)
    gaps = cursor.take(index_width, sum(entry.count for entry in entries)).astype(np.int64)
    changes = {width: _unzigzag(cursor.take(width, _count(entries, base, width))) for width in _WIDTHS}
    cursor.expect_end()
    return _cut(entries, base, gaps, changes, where)


def _cut(
    entries: Sequence[_Entry], base: State, gaps: Indices, changes: dict[int, Bits], where: str
) -> list[TensorPatch]:
    """Give each tensor its stretch of the joined integers."""
    patches, at = [], 0
    used = dict.fromkeys(_WIDTHS, 0)
    for entry in entries:
        of_tensor, size = gaps[at : at + entry.count], base[entry.name].bits.size
        indices = np.cumsum(of_tensor + 1) - 1
        # Each distance is looked at too: a sum of forged ones could wrap around.
        if len(indices) and not (of_tensor.min() >= 0 and of_tensor.max() < size and indices[-1] < size):
            raise WeightStoreError(f"{where}: an index of {entry.name} lies beyond its {size} elements")
        width = base[entry.name].bits.itemsize
        patches.append(TensorPatch(entry.name, indices, changes[width][used[width] : used[width] + entry.count]))
        at += entry.count
        used[width] += entry.count
    return patches


def _decompress(content: bytes, base: State, where: str) -> bytes:
    """Never more than a patch of every element could take."""
    if not content.startswith(PREFIX):
        raise WeightStoreError(f"{where} is not a sparse update of a form that this version knows ({PREFIX!r})")
    limit = _MAX_HEADER_BYTES + sum(tensor.bits.size * (8 + tensor.bits.itemsize) for tensor in base.values())
    frame = content[len(PREFIX) :]
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if not 0 < size <= limit:
            raise WeightStoreError(f"{where} would unpack to {size} bytes, its base allows {limit}")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as exc:
        raise WeightStoreError(f"{where} can't be unpacked: {exc}") from exc


def _read_header(words: bytes, where: str) -> tuple[int, list[_Entry]]:
    try:
        header: dict[str, Any] = json.loads(words)
        entries = [_Entry(name, dtype, tuple(shape), int(count)) for name, dtype, shape, count in header["tensors"]]
        if header["index_width"] not in _WIDTHS or len({entry.name for entry in entries}) != len(entries):
            raise ValueError("an index width or a name that can't be")
    except (ValueError, TypeError, KeyError) as exc:
        raise WeightStoreError(f"{where} has an unreadable header: {exc!r}") from exc
    return header["index_width"], entries


def _check_entry(entry: _Entry, base: State, where: str) -> None:
    own = base.get(entry.name)
    if own is None:
        raise WeightStoreError(f"{where}: the base has no tensor {entry.name!r}")
    if entry.shape != own.shape:
        raise WeightStoreError(f"{where}: {entry.name} has shape {entry.shape}, the base's is {own.shape}")
    if entry.dtype != own.dtype:
        raise WeightStoreError(f"{where}: {entry.name} has dtype {entry.dtype}, the base's is {own.dtype}")
    if not 0 <= entry.count <= own.bits.size:
        raise WeightStoreError(f"{where}: {entry.name} has {entry.count} changes and {own.bits.size} elements")


def _count(entries: Sequence[_Entry], base: State, width: int) -> int:
    return sum(entry.count for entry in entries if base[entry.name].bits.itemsize == width)


@dataclass
class _Cursor:
    """Reads planes one after the other."""

    payload: memoryview
    at: int
    where: str

    def take(self, width: int, count: int) -> Bits:
        """(count,) integers of `width` bytes."""
        end = self.at + width * count
        if end > len(self.payload):
            raise WeightStoreError(f"{self.where} ends before its changes do")
        planes = np.frombuffer(self.payload, np.uint8, width * count, self.at).reshape(width, count)
        self.at = end
        return np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1)

    def expect_end(self) -> None:
        if self.at != len(self.payload):
            raise WeightStoreError(f"{self.where} goes on after its changes")


def _gaps(indices: Indices) -> Bits:
    """[3, 4, 9] -> [3, 0, 4]: elements passed over since the index before."""
    gaps: Bits = np.diff(indices, prepend=-1).astype("<u8") - np.uint64(1)
    return gaps


def _zigzag(changes: Bits) -> Bits:
    """0, -1, 1, -2, ... -> 0, 1, 2, 3, ...: small in both directions is small."""
    signed = changes.view(f"<i{changes.itemsize}")
    folded: Bits = ((signed << 1) ^ (signed >> (8 * changes.itemsize - 1))).view(f"<u{changes.itemsize}")
    return folded


def _unzigzag(folded: Bits) -> Bits:
    one = folded.dtype.type(1)
    unfolded: Bits = (folded >> one) ^ (~(folded & one) + one)
    return unfolded


def _joined(arrays: Sequence[Bits], dtype: np.dtype[Any]) -> Bits:
    joined: Bits = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
    return joined


def _planes(integers: Bits) -> bytes:
    """All lowest bytes, then all next ones, ..."""
    return np.ascontiguousarray(integers).view(np.uint8).reshape(-1, integers.itemsize).T.tobytes()
