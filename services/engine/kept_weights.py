"""Keeps what an engine serves on disk, so that it can be loaded again after an update that failed half way.

An engine gets files that belong to somebody else and may be gone a second later. Hard links beside them keep them
without a copy; nobody writes into a file again once it was handed over. Used by vllm.py.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KEPT_PREFIX = "headwater-kept-"


@dataclass(frozen=True)
class Kept:
    """Weights as files: all tensors, then the patches that followed, in order."""

    folder: Path
    patches: tuple[Path, ...] = ()


class KeptWeights:
    """The weights in service, at first those of the model's own folder, and beside them those on their way."""

    def __init__(self, model_folder: Path) -> None:
        self._root: Path | None = None
        self._num_kept = 0
        self.served = Kept(model_folder)

    def keep(self, folder: Path) -> Kept:
        """The safetensors files of `folder` as candidates for `serve`."""
        return Kept(self._link(sorted(folder.glob("*.safetensors")), beside=folder))

    def keep_patch(self, patch: Path) -> Kept:
        """What is served, with one more patch."""
        return Kept(self.served.folder, (*self.served.patches, *self._link([patch], beside=patch).iterdir()))

    def serve(self, kept: Kept) -> None:
        """From now on `kept` is the last good one; what it replaces is deleted."""
        before, self.served = self.served, kept
        if before.folder != kept.folder:
            self.drop(before)

    def drop(self, kept: Kept) -> None:
        """Delete the files of `kept` that are ours and no part of what is served."""
        folders = {kept.folder, *(patch.parent for patch in kept.patches)}
        used = {self.served.folder, *(patch.parent for patch in self.served.patches)}
        for folder in folders - used:
            if folder.parent == self._root:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _link(self, files: Sequence[Path], *, beside: Path) -> Path:
        if self._root is None:
            self._root = _make_folder(beside)
        self._num_kept += 1
        target = self._root / str(self._num_kept)
        target.mkdir()
        for file in files:
            try:
                os.link(file, target / file.name)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(file, target / file.name)
        return target


def _make_folder(beside: Path) -> Path:
    """On the same file system if that can be written; after a kill it stays behind (services/rollout/weight_copy.py
    clears it)."""
    try:
        return Path(tempfile.mkdtemp(prefix=KEPT_PREFIX, dir=beside.parent))
    except OSError:
        return Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
