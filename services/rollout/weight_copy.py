"""A replica's own full copy of the newest weights on its disk: what sparse versions are applied to.

    FOLDER/v00000012/model.safetensors   in service; stays until a newer version is
    FOLDER/v00000012/copy.json           which version it is, and the checksum of its state
    FOLDER/v00000013.tmp/                being fetched and patched; renamed when its checksum is right
    FOLDER/v00000012.patches             what changed, for an engine that takes changes in place (safetensors)

Nothing here is synced to disk: a copy that is found again after a start is only used if its checksum is right. One
thread at a time. Called by the watcher (weights.py).
"""

import fcntl
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from services.engine.kept_weights import KEPT_PREFIX
from shared import metrics
from shared.errors import SettingsError, WeightStoreError
from shared.records import Record
from shared.weight_patches import TensorPatch, apply_patches, decode_patches
from shared.weight_state import BitTensor, State, map_state, parse_state, state_checksum, write_state
from shared.weight_store import FULL_FILE, SPARSE_FILE, Manifest, WeightStore

_log = logging.getLogger(__name__)

_COPY = "copy.json"
_FOLDER = re.compile(r"^v\d{8}$")


class CopyState(Record):
    """What copy.json holds."""

    version: int
    state_checksum: str


@dataclass(frozen=True)
class Staged:
    """A version that lies on this disk, whole and verified."""

    state: CopyState
    folder: Path
    base: int | None = None
    """The version that `patches` belong to."""
    patches: Path | None = None
    """What changed since `base`, where this version is one sparse update away from it (PatchableEngine)."""
    trouble: str = ""
    """Why it is an older version than the one asked for."""

    @property
    def version(self) -> int:
        return self.state.version


class _MismatchError(WeightStoreError):
    """Patches and the copy they were applied to do not belong together: one of both is wrong."""


class WeightCopy:
    """One replica's folder. `open` comes first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._current: Staged | None = None

    @property
    def version(self) -> int | None:
        return self._current.version if self._current else None

    def open(self) -> None:
        """Take the folder, clear what a killed replica left half done, and find its copy if that is intact.

        SettingsError if another replica works in it or it can't be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / ".lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in [*self._folder.glob("v*.tmp"), *self._folder.glob(f"{KEPT_PREFIX}*")]:
                shutil.rmtree(leftover)
            for leftover in self._folder.glob("v*.patches"):
                leftover.unlink()
        except BlockingIOError as exc:
            raise SettingsError(
                f"another replica keeps its weights in {self._folder}: give each a rollout.replica name of its own"
            ) from exc
        except OSError as exc:
            raise SettingsError(f"{self._folder} can't be written: {exc}; set rollout.weights_folder") from exc
        found = [entry for entry in sorted(self._folder.iterdir(), reverse=True) if _FOLDER.match(entry.name)]
        for folder in found:
            if self._current is None and (state := _intact(folder)) is not None:
                self._current = Staged(state, folder)
                _log.info("a copy of weight version %d is intact", state.version)
            else:
                shutil.rmtree(folder)

    def close(self) -> None:
        """The copy stays for the next start."""
        if self._lock is not None:
            self._lock.close()

    def stage(self, store: WeightStore, version: int, *, with_patches: bool) -> Staged:
        """Bring `version` onto this disk: by the changes since the own copy, or from the last full version.

        Where a later link of the way is missing or corrupt, the newest version before it, with its `trouble`.
        Raises WeightStoreError (OSError where the store is away) if nothing newer than the copy can be had.
        """
        links = store.chain(version, known=self.version)
        if not links:
            if (own := self._own(store.manifest(version))) is not None:
                return own
            return self._stage_links(store, store.chain(version), with_patches=False)
        try:
            return self._stage_links(store, links, with_patches=with_patches)
        except _MismatchError as exc:
            if links[0].form == "full":
                raise
            _log.warning("the own copy of version %s is not what it should be: %s", self.version, exc)
            return self._stage_links(store, store.chain(version), with_patches=False)

    def adopt(self, staged: Staged) -> None:
        """It is in service: the copy before it is not needed any more."""
        before, self._current = self._current, staged
        if before is not None and before.folder != staged.folder:
            _delete(before)

    def discard(self, staged: Staged) -> None:
        """The engine refused it: the copy before it stays the one that changes are applied to."""
        if self._current is None or staged.folder != self._current.folder:
            _delete(staged)

    def _own(self, wanted: Manifest) -> Staged | None:
        """The copy has the number of the version asked for; None if it is another run's version of that number."""
        assert self._current is not None
        return self._current if self._current.state.state_checksum == wanted.state_checksum else None

    def _stage_links(self, store: WeightStore, links: Sequence[Manifest], *, with_patches: bool) -> Staged:
        temporary = self._folder / f"{_folder_name(links[-1].version)}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            began = time.perf_counter()
            good, trouble = _fetch_links(store, links, temporary)
            fetched = time.perf_counter()
            metrics.weight_load_seconds.labels("fetch").observe(fetched - began)
            changes = [temporary / _link_name(link) for link in good if link.form == "sparse"]
            patched = None
            if changes:
                whole = temporary if good[0].form == "full" else self._current_folder
                patched = _patch(whole / FULL_FILE, changes, good[-1])
                patched.content.tofile(temporary / FULL_FILE)
                metrics.weight_load_seconds.labels("patch").observe(time.perf_counter() - fetched)
            state = CopyState(version=good[-1].version, state_checksum=good[-1].state_checksum)
            folder = self._settle(temporary, state, changes)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if not with_patches or patched is None or len(good) > 1:
            return Staged(state, folder, trouble=trouble)
        patches = folder.with_suffix(".patches")
        _write_patches(patches, patched)
        return Staged(state, folder, good[0].base, patches, trouble)

    @property
    def _current_folder(self) -> Path:
        assert self._current is not None, "a chain that begins sparse begins at the own copy"
        return self._current.folder

    def _settle(self, temporary: Path, state: CopyState, changes: Sequence[Path]) -> Path:
        """Under its own name it is complete."""
        for file in changes:
            file.unlink()
        (temporary / _COPY).write_text(state.model_dump_json(), encoding="utf-8")
        folder = self._folder / _folder_name(state.version)
        shutil.rmtree(folder, ignore_errors=True)
        return temporary.rename(folder)


@dataclass(frozen=True)
class _Patched:
    """A whole version in memory, its checksum compared."""

    content: NDArray[np.uint8]
    """The safetensors file."""
    state: State
    """Views into it."""
    patches: Sequence[TensorPatch]
    """The last ones applied."""


def _delete(staged: Staged) -> None:
    shutil.rmtree(staged.folder, ignore_errors=True)
    if staged.patches is not None:
        staged.patches.unlink(missing_ok=True)


def _fetch_links(store: WeightStore, links: Sequence[Manifest], into: Path) -> tuple[list[Manifest], str]:
    """Those that arrived intact, up to the first that did not, and what was wrong with it."""
    into.mkdir(parents=True)
    good: list[Manifest] = []
    try:
        for link in links:
            _fetch_link(store, link, into)
            good.append(link)
    except WeightStoreError as exc:
        if not good:
            raise
        return good, str(exc)
    return good, ""


def _fetch_link(store: WeightStore, link: Manifest, into: Path) -> None:
    wanted = FULL_FILE if link.form == "full" else SPARSE_FILE
    if [file.name for file in link.files] != [wanted]:
        raise WeightStoreError(
            f"weight version {link.version} is {link.form} and should be the one file {wanted}, "
            f"its manifest names {[file.name for file in link.files]}"
        )
    store.fetch(link, into)
    if link.form == "sparse":
        (into / SPARSE_FILE).rename(into / _link_name(link))
    metrics.weight_bytes_fetched_total.labels(link.form).inc(link.num_bytes)


def _folder_name(version: int) -> str:
    return f"v{version:08d}"


def _link_name(link: Manifest) -> str:
    return f"{link.version}.{SPARSE_FILE}"


def _patch(whole: Path, changes: Sequence[Path], wanted: Manifest) -> _Patched:
    """The state of `wanted`, from the file `whole` and all changes since. In memory, so that a full disk or a
    mismatch leaves no half-patched file."""
    try:
        content = np.fromfile(whole, np.uint8)
        state = parse_state(content.data, where=str(whole))
        patches: list[TensorPatch] = []
        for file in changes:
            patches = decode_patches(file.read_bytes(), state, where=file.name)
            apply_patches(state, patches)
    except (WeightStoreError, FileNotFoundError) as exc:
        raise _MismatchError(f"weight version {wanted.version}: {exc}") from exc
    checksum = state_checksum(state)
    if checksum != wanted.state_checksum:
        raise _MismatchError(
            f"weight version {wanted.version} comes out as {checksum}, its manifest says {wanted.state_checksum}"
        )
    return _Patched(content, state, patches)


def _write_patches(file: Path, patched: _Patched) -> None:
    """As `PatchableEngine.patch_weights` reads them: indices, and the new elements themselves."""
    tensors: dict[str, BitTensor] = {}
    shapes = {}
    for patch in patched.patches:
        tensor, count = patched.state[patch.name], (len(patch.indices),)
        tensors[f"{patch.name}.indices"] = BitTensor("I64", count, patch.indices.view(np.uint64))
        tensors[f"{patch.name}.values"] = BitTensor(tensor.dtype, count, tensor.bits[patch.indices])
        shapes[patch.name] = tensor.shape
    write_state(file, tensors, {"shapes": json.dumps(shapes)})


def _intact(folder: Path) -> CopyState | None:
    """The state of a copy that was found, None if it is not what it says."""
    try:
        state = CopyState.model_validate_json((folder / _COPY).read_bytes())
        right_place = folder.name == _folder_name(state.version)
        if right_place and state.state_checksum == state_checksum(map_state(folder / FULL_FILE)):
            return state
    except (OSError, ValidationError, WeightStoreError) as exc:
        _log.warning("the copy in %s can't be used: %s", folder, exc)
        return None
    _log.warning("the copy in %s is not what it says it is", folder)
    return None
