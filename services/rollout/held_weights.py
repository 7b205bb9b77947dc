"""A full weight version in a replica's memory, to which changes are applied. Used by weight_copy.py.

Work grows with the changes only: they alone are read for the new checksum (shared/weights/state.py), and bits change
only if it matches the manifest.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.errors import WeightStoreError
from shared.weights.patches import TensorPatch, apply_patches, decode_patches, foresee
from shared.weights.state import CHECKSUM_FORM, BitTensor, StateSums, parse_state, write_state
from shared.weights.store import Manifest


class MismatchError(WeightStoreError):
    """The changes do not fit the weights: one of them is wrong."""


class HeldWeights:
    """`checksum` follows `apply` and `undo`."""

    def __init__(self, files: Mapping[str, NDArray[np.uint8]], *, where: str) -> None:
        """`files`: safetensors files by name, writable; this object owns them from now on."""
        self._files = dict(files)
        self._state: dict[str, BitTensor] = {}
        for name, content in self._files.items():
            self._state |= parse_state(content.data, where=f"{where}/{name}")
        self._sums = StateSums.of(self._state)

    @classmethod
    def read(cls, folder: Path) -> "HeldWeights":
        """All safetensors files of `folder`. MismatchError if there is none, or one is unreadable."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise MismatchError(f"no *.safetensors file in {folder}")
        try:
            return cls({file.name: np.fromfile(file, np.uint8) for file in files}, where=str(folder))
        except (WeightStoreError, FileNotFoundError) as exc:
            raise MismatchError(f"{folder}: {exc}") from exc

    @property
    def checksum(self) -> str:
        return self._sums.checksum

    def copy(self) -> "HeldWeights":
        files = {name: content.copy() for name, content in self._files.items()}
        return HeldWeights(files, where="a copy of the weights in memory")

    def is_intact(self) -> bool:
        """Reads the whole state."""
        return StateSums.of(self._state).checksum == self._sums.checksum

    def apply(self, files: Sequence[Path], wanted: Manifest) -> list[TensorPatch]:
        """Become version `wanted` by the changes in `files`, which are returned.

        Raises MismatchError, and changes nothing, if the result would not have the manifest's checksums."""
        name, checksum = f"weight version {wanted.version}", wanted.state_checksum
        if not checksum.startswith(CHECKSUM_FORM):
            raise MismatchError(
                f"{name} was written by another version of this program, its checksum is {checksum}: "
                "restart the trainer, which begins with a full version"
            )
        try:
            patches = [
                patch for file in files for patch in decode_patches(file.read_bytes(), self._state, where=file.name)
            ]
        except WeightStoreError as exc:
            raise MismatchError(f"{name}: {exc}") from exc
        sums, changed = foresee(self._sums, patches, self._state)
        if sums.checksum != checksum:
            raise MismatchError(f"{name} comes out as {sums.checksum}, its manifest says {checksum}")
        if changed != wanted.changed_checksum:
            said = wanted.changed_checksum or "nothing of them"
            raise MismatchError(f"the changed elements of {name} come out as {changed}, its manifest says {said}")
        apply_patches(self._state, patches)
        self._sums = sums
        return patches

    def undo(self, patches: Sequence[TensorPatch]) -> None:
        """Take back `patches`, the last ones applied (of one or several versions, in order)."""
        for patch in reversed(patches):
            inverse = TensorPatch(patch.name, patch.indices, np.negative(patch.changes))
            self._sums, _ = foresee(self._sums, [inverse], self._state)
            apply_patches(self._state, [inverse])

    def write(self, folder: Path) -> None:
        """As safetensors files, under the names under which they were read."""
        for name, content in self._files.items():
            content.tofile(folder / name)

    def write_changes(self, file: Path, patches: Sequence[TensorPatch]) -> None:
        """The changed elements with their present values, as `PatchableEngine.patch_weights` reads them."""
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
