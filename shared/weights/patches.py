"""The sparse form of a weight version: only the elements whose bits changed since its base. Lossless.

    PREFIX | zstd( length of the header | header (JSON) | index planes | change planes )

At small learning rates a step of AdamW leaves most bfloat16 elements unchanged and moves the others by one unit in the
last place. So an index is stored as its distance from the one before, and a value as the difference of its bits from
the base's, modulo 2^width: exact for every bit pattern and nearly always +1 or -1. Byte planes (all lowest bytes, then
all next ones, ...) show zstd how small they are.

An update may be several such files, so that nobody holds the bytes of all changes to pack or unpack them.
services/rollout/held_weights.py compares the checksums in the manifest before it applies a patch.
"""

import json
from collections.abc import Mapping, Sequence
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
    name: str
    indices: Indices
    """(N,) into the flattened tensor, ascending, distinct."""
    changes: Bits
    """(N,) to add to the base's bits, modulo 2^width."""


def find_patch(name: str, before: Bits, after: Bits, *, start: int = 0) -> TensorPatch:
    """The changes between two times N elements of a tensor, of which the first is number `start`."""
    indices = np.flatnonzero(before != after)
    return TensorPatch(name, indices + start if start else indices, after[indices] - before[indices])


def apply_patches(state: State, patches: Sequence[TensorPatch]) -> None:
    """Change `state` in place: writable, and the base of `patches`."""
    for patch in patches:
        state[patch.name].bits[patch.indices] += patch.changes


def foresee(sums: StateSums, patches: Sequence[TensorPatch], base: State) -> tuple[StateSums, str]:
    """The sums of `base` (now `sums`) after `patches`, and the checksum of the changed elements alone. The sums show
    whether the patches fit the base, the checksum whether the bits in memory are still the base's."""
    foreseen, changed = sums.copy(), ChangedChecksum()
    for patch in patches:
        before = base[patch.name].bits[patch.indices]
        after = before + patch.changes
        foreseen.change(patch.name, patch.indices, before, after)
        changed.add(after)
    return foreseen, changed.checksum


class ChangedChecksum:
    """Of the changed elements, after the changes, in the order in which they are sent."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, after: Bits) -> None:
        self._digest.update(after.data)

    @property
    def checksum(self) -> str:
        return f"xxh3_128:{self._digest.hexdigest()}"


def encode_patches(patches: Sequence[TensorPatch], base: State) -> bytes:
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
    """Read a file and check it against its base. Raises WeightStoreError with the first thing that does not fit."""
    payload = memoryview(_decompress(content, base, where))
    start = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    index_width, counts = _read_header(bytes(payload[_LENGTH_BYTES:start]), base, where)
    widths = {name: base[name].bits.itemsize for name in counts}
    num_bytes = sum(count * (index_width + widths[name]) for name, count in counts.items())
    if num_bytes != len(payload) - start:
        raise WeightStoreError(f"{where} has {len(payload) - start} bytes of changes, its header says {num_bytes}")
    gaps = _split(payload[start:], index_width, counts)
    start += index_width * sum(counts.values())
    changes: dict[str, Bits] = {}
    for width in _WIDTHS:
        of_width = {name: count for name, count in counts.items() if widths[name] == width}
        changes |= _split(payload[start:], width, of_width)
        start += width * sum(of_width.values())
    return [
        TensorPatch(name, _indices(gaps[name], base[name].bits.size, f"{where}: {name}"), _unzigzag(changes[name]))
        for name in counts
    ]


def _split(planes: memoryview, width: int, counts: Mapping[str, int]) -> dict[str, Bits]:
    """The integers of `width` bytes at the beginning of `planes`, by tensor."""
    total = sum(counts.values())
    content = np.frombuffer(planes, np.uint8, width * total).reshape(width, total)
    integers = np.ascontiguousarray(content.T).view(f"<u{width}").reshape(-1)
    ends = np.cumsum([*counts.values()])
    return {name: integers[end - count : end] for (name, count), end in zip(counts.items(), ends, strict=True)}


def _indices(gaps: Bits, size: int, where: str) -> Indices:
    """[3, 0, 4] -> [3, 4, 9]."""
    distances = gaps.astype(np.int64)
    indices: Indices = np.cumsum(distances + 1) - 1
    # Check each distance too: the sum of forged ones could wrap around.
    if len(indices) and not (distances.min() >= 0 and distances.max() < size and indices[-1] < size):
        raise WeightStoreError(f"{where}: an index lies beyond its {size} elements")
    return indices


def _decompress(content: bytes, base: State, where: str) -> bytes:
    """Refuses what unpacks to more than a patch of every element."""
    if not content.startswith(PREFIX):
        raise WeightStoreError(f"{where} is not a sparse update in a form that this version reads ({PREFIX!r})")
    limit = _MAX_HEADER_BYTES + sum(tensor.bits.size * (8 + tensor.bits.itemsize) for tensor in base.values())
    frame = content[len(PREFIX) :]
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if not 0 < size <= limit:
            raise WeightStoreError(f"{where} would unpack to {size} bytes, its base allows {limit}")
        return zstandard.ZstdDecompressor().decompress(frame)
    except zstandard.ZstdError as exc:
        raise WeightStoreError(f"{where} can't be unpacked: {exc}") from exc


def _read_header(words: bytes, base: State, where: str) -> tuple[int, dict[str, int]]:
    """The bytes of an index, and by tensor how many elements changed."""
    try:
        header: dict[str, Any] = json.loads(words)
        entries = {name: (dtype, tuple(shape), int(count)) for name, dtype, shape, count in header["tensors"]}
        if header["index_width"] not in _WIDTHS or len(entries) != len(header["tensors"]):
            raise ValueError("an invalid index width or a name that occurs twice")
    except (ValueError, TypeError, KeyError) as exc:
        raise WeightStoreError(f"{where} has an unreadable header: {exc!r}") from exc
    for name, (dtype, shape, count) in entries.items():
        own = base.get(name)
        if own is None:
            raise WeightStoreError(f"{where}: the base has no tensor {name!r}")
        for what, given, expected in (("shape", shape, own.shape), ("dtype", dtype, own.dtype)):
            if given != expected:
                raise WeightStoreError(f"{where}: {name} has {what} {given}, the base's is {expected}")
        if not 0 <= count <= own.bits.size:
            raise WeightStoreError(f"{where}: {name} has {count} changes and {own.bits.size} elements")
    return header["index_width"], {name: count for name, (_, _, count) in entries.items()}


def _gaps(indices: Indices) -> Bits:
    """[3, 4, 9] -> [3, 0, 4]: elements skipped since the index before."""
    gaps: Bits = np.diff(indices, prepend=-1).astype("<u8") - np.uint64(1)
    return gaps


def _zigzag(changes: Bits) -> Bits:
    """0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
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
