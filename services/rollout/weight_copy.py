"""A replica's copy of the weights that it serves: a full version on disk, and one in memory to apply changes to.

    FOLDER/v00000012/*.safetensors       a full version in one or several files; a restart begins with the newest
    FOLDER/v00000012/copy.json           its version, epoch and state checksum
    FOLDER/v00000013.tmp/                being fetched or written; renamed when complete
    FOLDER/v00000013.patches             what changed, for an engine that takes changes in place (safetensors)

What restores the version in service, a whole copy and the patches after it, stays until the engine serves the next one:
an engine whose update fails half way loads it again.

For an engine that takes changes in place, a sparse version is checked and applied to the copy in memory
(held_weights.py), then handed to the engine. The copy on disk is replaced by the next full version, or when it is
`COPY_EVERY` versions behind and the replica is idle. Any other engine gets a whole new copy on disk at every version.

Nothing is synced to disk: a copy found at the start is used only if its checksum is right. One thread at a time. Called
by watcher.py.
"""

import contextlib
import fcntl
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from services.rollout.held_weights import HeldWeights, MismatchError
from shared import metrics
from shared.errors import SettingsError, WeightStoreError
from shared.records import Record
from shared.weights.patches import TensorPatch
from shared.weights.state import map_folder, state_checksum
from shared.weights.store import FULL_FILE, SPARSE_FILE, Manifest, WeightStore

COPY_EVERY = 20
"""Sparse versions after which the copy on disk is rewritten: the most that a restart fetches and applies."""

_log = logging.getLogger(__name__)

_COPY = "copy.json"
_FOLDER = re.compile(r"^v\d{8}(-2)?$")


class CopyState(Record):
    version: int
    epoch: str = ""
    state_checksum: str

    @classmethod
    def of(cls, manifest: Manifest) -> "CopyState":
        return cls(version=manifest.version, epoch=manifest.epoch, state_checksum=manifest.state_checksum)


@dataclass(frozen=True)
class Changes:
    """How the copy in memory became another version."""

    base: int
    patches: Sequence[TensorPatch]
    """In the order in which they were applied to `base`."""
    file: Path
    """The changed elements, for `PatchableEngine.patch_weights`."""
    last_good: Sequence[Path]
    """What restores `base`: a whole copy, then patches in order."""


@dataclass(frozen=True)
class Staged:
    """A verified version, ready to be served: full on disk, or as changes already applied to the copy in memory."""

    state: CopyState
    folder: Path | None
    """None: `changes` it is."""
    changes: Changes | None = None
    trouble: str = ""
    """Why this version is older than the requested one."""


class WeightCopy:
    """One replica's folder. Call `open` first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self.current: CopyState | None = None
        """The version that changes apply to, in memory or else on disk."""
        self._disk: tuple[CopyState, Path] | None = None
        self._patches: list[Path] = []
        """What the engine took in place since `_disk`."""
        self._replaced: list[Path] = []
        """What restored the version in service before `_disk` was written again."""
        self._copied_at = 0
        """The version at which the copy on disk was last written, or should have been."""
        self._held: HeldWeights | None = None
        """Holds `_current`, from the first changes that the engine takes in place on."""

    def open(self) -> None:
        """Lock the folder, delete what a killed replica left half made, and find its copy if that is intact.
        SettingsError if another replica uses the folder or it can't be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / ".lock").open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in self._folder.glob("v*.tmp"):
                shutil.rmtree(leftover)
            for leftover in self._folder.glob("v*.patches"):
                leftover.unlink()
        except BlockingIOError as exc:
            raise SettingsError(
                f"another replica keeps its weights in {self._folder}: give each replica another rollout.replica name"
            ) from exc
        except OSError as exc:
            raise SettingsError(f"{self._folder} can't be written: {exc}; set rollout.weights_folder") from exc
        found = [entry for entry in sorted(self._folder.iterdir(), reverse=True) if _FOLDER.match(entry.name)]
        for folder in found:
            if self._disk is None and (state := _intact(folder)) is not None:
                self.current, self._disk, self._copied_at = state, (state, folder), state.version
                _log.info("a copy of weight version %d is intact", state.version)
            else:
                shutil.rmtree(folder)

    def close(self) -> None:
        """The copy on disk stays for the next start."""
        if self._lock is not None:
            self._lock.close()

    def stage(self, store: WeightStore, wanted: Manifest, *, with_changes: bool) -> Staged:
        """Fetch and verify a version, in full or as changes (`with_changes`: the engine serves the current version and
        takes changes in place).

        If a version on the way is missing or corrupt, the newest one before it is staged, with its `trouble`. Raises
        WeightStoreError if nothing is newer than the current version, OSError if the store is away.
        """
        same_epoch = self.current is not None and self.current.epoch == wanted.epoch  # changes apply only within one
        links = store.chain(wanted.version, known=self.current.version if self.current and same_epoch else None)
        if not links:
            if self._disk is not None and self._disk[0] == CopyState.of(wanted):
                return Staged(*self._disk)
            return self._stage_whole(store, store.chain(wanted.version))  # another run's version of that number
        try:
            if with_changes and links[0].form == "sparse":
                return self._stage_changes(store, links)
            return self._stage_whole(store, links)
        except MismatchError as exc:
            if links[0].form == "full":
                raise
            _log.warning("this replica's copy of the weights is damaged: %s", exc)
            return self._stage_whole(store, store.chain(wanted.version))

    def write(self, staged: Staged) -> Staged:
        """The same version in full on disk, for an engine that did not take the changes."""
        if staged.folder is not None:
            return staged
        assert self._held is not None
        return replace(staged, folder=self._write(self._held, staged.state))

    def adopt(self, staged: Staged) -> None:
        """It is in service: what restored the version before it is deleted."""
        self.current = staged.state
        changes = [] if staged.changes is None else [staged.changes.file]
        if staged.folder is None:
            self._patches += changes
        else:
            self._settle(staged.state, staged.folder)
            self._replaced += changes
            if self._held is not None and not changes:
                self._held = None  # frees its memory first
                self._held = _try_read(staged.folder)
        for path in self._replaced:
            _delete(path)
        self._replaced.clear()

    def discard(self, staged: Staged) -> None:
        """The engine refused it: changes still apply to the version before it."""
        if staged.changes is not None:
            assert self._held is not None
            self._held.undo(staged.changes.patches)
            staged.changes.file.unlink(missing_ok=True)
        if staged.folder is not None and (self._disk is None or staged.folder != self._disk[1]):
            shutil.rmtree(staged.folder, ignore_errors=True)

    def keep_up(self) -> None:
        """Rewrite the copy on disk if it is due. If that fails, only a restart has more to do."""
        if self._held is None or self.current is None or self.current.version < self._copied_at + COPY_EVERY:
            return
        self._copied_at = self.current.version
        if not self._held.is_intact():
            _log.error("the weights in memory have changed by themselves: check this machine's memory")
            assert self._disk is not None
            self._held, self.current = None, self._disk[0]  # changes now apply to the copy on disk
            return
        try:
            self._settle(self.current, self._write(self._held, self.current))
        except OSError as exc:
            _log.warning("weight version %d could not be copied to disk: %s", self.current.version, exc)

    def _stage_changes(self, store: WeightStore, links: Sequence[Manifest]) -> Staged:
        """Reads and writes nothing of the size of the model, except the first time."""
        assert self.current is not None
        if self._held is None:
            self._held = self._read_disk()
        applied: list[TensorPatch] = []
        with self._room(links[-1].version) as temporary:
            try:
                good, trouble = _fetch_links(store, links, temporary)
                began = time.perf_counter()
                for link in good:
                    applied += self._held.apply(_link_files(link, temporary), link)
                changed = self._folder / f"{_folder_name(good[-1].version)}.patches"
                self._held.write_changes(changed, applied)
                metrics.weight_load_seconds.labels("patch").observe(time.perf_counter() - began)
            except BaseException:
                self._held.undo(applied)
                raise
        assert self._disk is not None
        changes = Changes(self.current.version, applied, changed, last_good=(self._disk[1], *self._patches))
        return Staged(CopyState.of(good[-1]), None, changes, trouble)

    def _stage_whole(self, store: WeightStore, links: Sequence[Manifest]) -> Staged:
        with self._room(links[-1].version) as temporary:
            good, trouble = _fetch_links(store, links, temporary)
            changes = [link for link in good if link.form == "sparse"]
            if changes:
                began = time.perf_counter()
                if good[0].form == "full":
                    whole = HeldWeights.read(temporary)
                else:
                    whole = self._held.copy() if self._held is not None else self._read_disk()
                for link in changes:
                    whole.apply(_link_files(link, temporary), link)
                    shutil.rmtree(_link_folder(link, temporary))
                whole.write(temporary)
                metrics.weight_load_seconds.labels("patch").observe(time.perf_counter() - began)
            state = CopyState.of(good[-1])
            return Staged(state, self._name(temporary, state), trouble=trouble)

    def _read_disk(self) -> HeldWeights:
        assert self._disk is not None, "a chain that begins with a sparse version begins at this copy"
        state, folder = self._disk
        held = HeldWeights.read(folder)
        if held.checksum != state.state_checksum:
            raise MismatchError(f"{folder} holds {held.checksum} and was {state.state_checksum}")
        return held

    def _settle(self, state: CopyState, folder: Path) -> None:
        """This is the copy on disk; the one before it goes with the next version in service."""
        if self._disk is not None and self._disk[1] != folder:
            self._replaced.append(self._disk[1])
        self._replaced += self._patches
        self._disk, self._patches, self._copied_at = (state, folder), [], state.version

    @contextlib.contextmanager
    def _room(self, version: int) -> Iterator[Path]:
        """An empty folder for a version in the making."""
        temporary = self._folder / f"{_folder_name(version)}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, held: HeldWeights, state: CopyState) -> Path:
        with self._room(state.version) as temporary:
            held.write(temporary)
            return self._name(temporary, state)

    def _name(self, temporary: Path, state: CopyState) -> Path:
        """Rename a complete copy to its final name."""
        (temporary / _COPY).write_text(state.model_dump_json(), encoding="utf-8")
        folder = self._folder / _folder_name(state.version)
        if folder in [*self._replaced, *([self._disk[1]] if self._disk else [])]:  # of another epoch
            folder = folder.with_name(f"{folder.name}-2")
        _delete(folder)
        return temporary.rename(folder)


def _folder_name(version: int) -> str:
    return f"v{version:08d}"


def _try_read(folder: Path) -> HeldWeights | None:
    try:
        return HeldWeights.read(folder)
    except (OSError, WeightStoreError) as exc:
        _log.warning("%s can't be read into memory: %s", folder, exc)
        return None


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link_folder(link: Manifest, room: Path) -> Path:
    """A full version lies in `room` itself, where it becomes the replica's copy."""
    return room if link.form == "full" else room / f"{link.version}.changes"


def _link_files(link: Manifest, room: Path) -> list[Path]:
    """In the order in which they are applied."""
    return [_link_folder(link, room) / file.name for file in link.files]


def _fetch_links(store: WeightStore, links: Sequence[Manifest], into: Path) -> tuple[list[Manifest], str]:
    """The links before the first that is missing or corrupt, and what is wrong with that one."""
    good: list[Manifest] = []
    with metrics.weight_load_seconds.labels("fetch").time():
        for link in links:
            try:
                _fetch_link(store, link, into)
            except WeightStoreError as exc:
                if not good:
                    raise
                return good, str(exc)
            good.append(link)
    return good, ""


def _fetch_link(store: WeightStore, link: Manifest, into: Path) -> None:
    suffix = Path(FULL_FILE if link.form == "full" else SPARSE_FILE).suffix
    if not link.files or any(Path(file.name).suffix != suffix for file in link.files):
        raise WeightStoreError(
            f"weight version {link.version} is {link.form} and should be files ending in {suffix}, "
            f"its manifest names {[file.name for file in link.files]}"
        )
    store.fetch(link, _link_folder(link, into))
    metrics.weight_bytes_fetched_total.labels(link.form).inc(link.num_bytes)


def _intact(folder: Path) -> CopyState | None:
    """The state of the copy in `folder`; None if it is damaged."""
    try:
        state = CopyState.model_validate_json((folder / _COPY).read_bytes())
        right_place = folder.name.removesuffix("-2") == _folder_name(state.version)
        if right_place and state.state_checksum == state_checksum(map_folder(folder)):
            return state
    except (OSError, ValidationError, WeightStoreError) as exc:
        _log.warning("the copy in %s can't be used: %s", folder, exc)
        return None
    _log.warning("the copy in %s does not have its checksum", folder)
    return None
