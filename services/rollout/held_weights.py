"""A whole weight version in a replica's memory: what changes are found to fit, and applied to. Used by weight_copy.py.

An update takes work in proportion to its changes: their old bits are read, the checksum of the whole state is brought
up to date from them (shared/weights/state.py), and only if it is the manifest's do bits change.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import WeightStoreError
from shared.weights.patches import TensorPatch, apply_patches, decode_patches, foresee
from shared.weights.state import CHECKSUM_FORM, BitTensor, StateSums, parse_state, write_state
from shared.weights.store import Manifest


class MismatchError(WeightStoreError):
    """Changes and the weights they were to be applied to do not belong together: one of both is wrong."""


class HeldWeights:
    """`checksum` is that of what is held; it changes with `apply` and `undo`."""

    def __init__(self, content: NDArray[np.uint8], *, where: str) -> None:
        """`content` is a safetensors file, writable; it belongs to this object from now on."""
        self._content = content
        self._state = parse_state(content.data, where=where)
        self._sums = StateSums.of(self._state)

    @classmethod
    def read(cls, file: Path) -> "HeldWeights":
        """MismatchError if there is no readable file: the copy is not what it should be."""
        try:
            return cls(np.fromfile(file, np.uint8), where=str(file))
        except (WeightStoreError, FileNotFoundError) as exc:
            raise MismatchError(f"{file}: {exc}") from exc

    @property
    def checksum(self) -> str:
        return self._sums.checksum

    def copy(self) -> "HeldWeights":
        return HeldWeights(self._content.copy(), where="a copy of the weights in memory")

    def is_intact(self) -> bool:
        """Reads the whole state."""
        return StateSums.of(self._state).checksum == self._sums.checksum

    def apply(self, file: Path, wanted: Manifest) -> list[TensorPatch]:
        """Become `wanted` by the changes in `file`; returns them. MismatchError, and nothing has changed, unless the
        result has the manifest's checksums."""
        version, checksum = wanted.version, wanted.state_checksum
        if not checksum.startswith(CHECKSUM_FORM):
            raise MismatchError(
                f"weight version {version} was written by another version of this program, its checksum is {checksum}: "
                "start the trainer, which begins with a full version"
            )
        try:
            patches = decode_patches(file.read_bytes(), self._state, where=file.name)
        except WeightStoreError as exc:
            raise MismatchError(f"weight version {version}: {exc}") from exc
        sums, changed = foresee(self._sums, patches, self._state)
        if sums.checksum != checksum:
            raise MismatchError(f"weight version {version} comes out as {sums.checksum}, its manifest says {checksum}")
        if changed != wanted.changed_checksum:
            raise MismatchError(
                f"the changed elements of weight version {version} come out as {changed}, its manifest says "
                f"{wanted.changed_checksum or 'nothing of them'}"
            )
        apply_patches(self._state, patches)
        self._sums = sums
        return patches

    def undo(self, patches: Sequence[TensorPatch]) -> None:
        """Become again what was held before `patches` (of several versions: one after the other) were applied."""
        for patch in reversed(patches):
            inverse = TensorPatch(patch.name, patch.indices, np.negative(patch.changes))
            self._sums, _ = foresee(self._sums, [inverse], self._state)
            apply_patches(self._state, [inverse])

    def write(self, file: Path) -> None:
        """As a safetensors file."""
        self._content.tofile(file)

    def write_changes(self, file: Path, patches: Sequence[TensorPatch]) -> None:
        """The elements that `patches` changed, as they are now, in the form that `PatchableEngine.patch_weights`
        reads."""
        indices: dict[str, list[NDArray[np.int64]]] = {}
        for patch in patches:
            indices.setdefault(patch.name, []).append(patch.indices)
        tensors: dict[str, BitTensor] = {}
        shapes = {}
        for name, of_tensor in indices.items():
            changed = of_tensor[0] if len(of_tensor) == 1 else np.unique(np.concatenate(of_tensor))
            tensor, count = self._state[name], (len(changed),)
            tensors[f"{name}.indices"] = BitTensor("I64", count, changed.view(np.uint64))
            tensors[f"{name}.values"] = BitTensor(tensor.dtype, count, tensor.bits[changed])
            shapes[name] = tensor.shape
        write_state(file, tensors, {"shapes": json.dumps(shapes)})
