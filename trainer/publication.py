"""What one weight version consists of: the bits published last, the changes since, and the files of both forms.

    published.changes(snapshot)      compare and take over, tensor by tensor -> packed pieces of bounded size
    published.hold(snapshot)         take over as they are, for a full version
    write_full(writer, ...)          in files of bounded size, as the tensors come

Beside the snapshot this keeps the last bits (2 bytes a parameter in bfloat16) and the packed changes, a few percent of
them: never a file in memory. numpy, zstd and the hashes release the GIL, so the training step goes on meanwhile.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shared.weights.patches import ChangedChecksum, TensorPatch, encode_patches, find_patch
from shared.weights.state import Bits, BitTensor, FileLayout, StateSums, Sums, lay_out_files, row_sums
from shared.weights.store import FULL_FILE, VersionWriter, file_names
from trainer.snapshot import Snapshot

MAX_FILE_BYTES = 4 << 30
"""Of tensors in a file of a full version; a larger tensor has a file of its own."""
PIECE_CHANGES = 1 << 22
"""Changed elements in a file of a sparse version: packing takes about 30 bytes for each."""
_BLOCK_ELEMENTS = 1 << 20
"""Compared at once: what fits a processor's cache."""

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPE_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
_DTYPE_NAMES |= {torch.uint8: "U8", torch.bool: "BOOL"}
"""What safetensors calls them."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Layouts = dict[str, tuple[str, tuple[int, ...]]]
NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Changes:
    """Of a whole version, packed."""

    pieces: list[bytes]
    changed_checksum: str


def bits_of(tensor: Tensor) -> Bits:
    """(N,) A view of a contiguous CPU tensor."""
    width = tensor.itemsize
    bits: Bits = tensor.reshape(-1).view(_BITS[width]).numpy().view(f"<u{width}")
    return bits


def named_bits(tensors: NamedTensors) -> Iterator[tuple[str, Bits]]:
    return ((name, bits_of(tensor)) for name, tensor in tensors)


class PublishedBits:
    """The state that was published last. One thread at a time."""

    def __init__(self) -> None:
        self.state: dict[str, BitTensor] = {}
        self._rows: dict[str, Sums] = {}

    @property
    def sums(self) -> StateSums:
        return StateSums({name: tensor.layout for name, tensor in self.state.items()}, self._rows)

    def bits(self) -> Iterator[tuple[str, Bits]]:
        """In the order in which the tensors came."""
        return ((name, tensor.bits) for name, tensor in self.state.items())

    def hold(self, tensors: NamedTensors) -> None:
        """Take over a state; its memory is this object's own."""
        for name, tensor in tensors:
            bits = bits_of(tensor)
            if name in self.state:
                np.copyto(self.state[name].bits, bits)
            else:
                self.state[name] = BitTensor(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), bits.copy())
            self._rows[name] = row_sums(self.state[name].bits)

    def changes(self, tensors: NamedTensors) -> Changes | None:
        """Take over a state and return how it differs from the one before; None if that would be no smaller."""
        packing, changed, sums, num_bytes = _Packing(self.state), ChangedChecksum(), self.sums, 0
        for name, tensor in tensors:
            held, bits = self.state[name].bits, bits_of(tensor)
            for start in range(0, len(bits), _BLOCK_ELEMENTS):
                before, after = held[start : start + _BLOCK_ELEMENTS], bits[start : start + _BLOCK_ELEMENTS]
                patch = find_patch(name, before, after, start=start)
                if not len(patch.indices):
                    continue
                values = bits[patch.indices]
                sums.change(name, patch.indices, held[patch.indices], values)
                np.copyto(before, after)
                if not packing.is_too_large:
                    changed.add(values)
                    packing.add(patch)
            num_bytes += bits.nbytes
            packing.is_too_large |= packing.num_bytes > num_bytes
        packing.flush()
        if packing.is_too_large or packing.num_bytes >= num_bytes:
            return None
        return Changes(packing.pieces, changed.checksum)


@dataclass
class _Packing:
    """Packs changes whenever enough of them have come."""

    base: dict[str, BitTensor]
    pieces: list[bytes] = field(default_factory=list)
    is_too_large: bool = False
    """A full version is smaller: nothing is packed any more."""
    _waiting: dict[str, list[TensorPatch]] = field(default_factory=dict)
    _num_waiting: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.pieces))

    def add(self, patch: TensorPatch) -> None:
        self._waiting.setdefault(patch.name, []).append(patch)
        self._num_waiting += len(patch.indices)
        if self._num_waiting >= PIECE_CHANGES:
            self._pack()

    def flush(self) -> None:
        """Also a version without any change has a file."""
        if not self.is_too_large and (self._waiting or not self.pieces):
            self._pack()

    def _pack(self) -> None:
        patches = [_joined(name, parts) for name, parts in self._waiting.items()]
        self.pieces.append(encode_patches(patches, self.base))
        self._waiting, self._num_waiting = {}, 0


def _joined(name: str, parts: list[TensorPatch]) -> TensorPatch:
    indices = np.concatenate([part.indices for part in parts])
    return TensorPatch(name, indices, np.concatenate([part.changes for part in parts]))


def layouts_of(snapshot: Snapshot) -> Layouts:
    """As safetensors names them."""
    return {name: (_DTYPE_NAMES[dtype], tuple(shape)) for name, (dtype, shape) in snapshot.layouts.items()}


def write_full(writer: VersionWriter, layouts: Layouts, tensors: Iterator[tuple[str, Bits]]) -> None:
    """All tensors, which come in the order of `layouts`."""
    for name, file in full_files(layouts, max_bytes=MAX_FILE_BYTES).items():
        writer.write(name, content_of(file, tensors))


def full_files(layouts: Layouts, *, max_bytes: int) -> dict[str, FileLayout]:
    """By name the safetensors files of a whole state, as transformers names them."""
    files = lay_out_files(layouts, {"format": "pt"}, max_bytes=max_bytes)
    return dict(zip(file_names(FULL_FILE, len(files)), files, strict=True))


def content_of(file: FileLayout, tensors: Iterator[tuple[str, Bits]]) -> Iterator[bytes | memoryview]:
    """Takes the file's tensors, which must be the next ones."""
    yield file.header
    for expected in file.offsets:
        name, bits = next(tensors)
        assert name == expected, f"{name} came where {expected} belongs"
        yield bits.data


def summed(tensors: NamedTensors, rows: dict[str, Sums]) -> Iterator[tuple[str, Bits]]:
    """The bits of each, whose sums are noted in `rows`."""
    for name, tensor in tensors:
        bits = bits_of(tensor)
        rows[name] = row_sums(bits)
        yield name, bits
