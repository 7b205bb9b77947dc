"""What a replica keeps of the weights that it serves: a whole copy on its disk, and in memory what changes apply to.

    FOLDER/v00000012/model.safetensors   a whole version; the newest of them is what a restart begins with
    FOLDER/v00000012/copy.json           which version it is, of which epoch, and the checksum of its state
    FOLDER/v00000013.tmp/                being fetched, or written; renamed when it is whole
    FOLDER/v00000013.patches             what changed, for an engine that takes changes in place (safetensors)

What restores the version in service, a whole copy and the patches after it, stays until the engine serves the next one:
an engine whose update fails half way loads it again.

A sparse version costs an engine that takes changes in place what the changes cost: they are checked and applied to the
copy in memory (held_weights.py), then handed to the engine. The copy on disk stays as it is until the next full version
replaces it, or until it is `COPY_EVERY` versions behind and there is nothing else to do. Any other engine gets a whole
new copy on disk at every version.

Nothing here is synced to disk: a copy that is found again after a start is only used if its checksum is right. One
thread at a time. Called by the watcher (weights.py).
"""

import fcntl
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from services.rollout.held_weights import HeldWeights, MismatchError
from shared import metrics
from shared.errors import SettingsError, WeightStoreError
from shared.records import Record
from shared.weights.patches import TensorPatch
from shared.weights.state import map_state, state_checksum
from shared.weights.store import FULL_FILE, SPARSE_FILE, Manifest, WeightStore

COPY_EVERY = 20
"""Sparse versions until the copy on disk is written again: what a restart has to fetch and apply at the most. With
fewer between full versions (weights.full_every) it never is."""

_log = logging.getLogger(__name__)

_COPY = "copy.json"
_FOLDER = re.compile(r"^v\d{8}(-2)?$")


class CopyState(Record):
    """Which version a copy is; what copy.json holds."""

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
    """The version before."""
    patches: Sequence[TensorPatch]
    """What was applied to it, in order."""
    file: Path
    """The changed elements, for `PatchableEngine.patch_weights`."""
    last_good: Sequence[Path]
    """What restores `base`: a whole copy, then patches in order."""


@dataclass(frozen=True)
class Staged:
    """A version that can be served: whole on this disk, or as changes that the copy in memory has taken. Verified."""

    state: CopyState
    folder: Path | None
    """None: `changes` it is."""
    changes: Changes | None = None
    trouble: str = ""
    """Why it is an older version than the one asked for."""

    @property
    def version(self) -> int:
        return self.state.version


class WeightCopy:
    """One replica's folder. `open` comes first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: IO[bytes] | None = None
        self._current: CopyState | None = None
        """What changes apply to: the version in memory, or else the one on disk."""
        self._disk: tuple[CopyState, Path] | None = None
        self._patches: list[Path] = []
        """What the engine took in place since `_disk`."""
        self._replaced: list[Path] = []
        """What restored the version in service before `_disk` was written again."""
        self._copied_at = 0
        """The version at which the copy on disk was last written, or should have been."""
        self._held: HeldWeights | None = None
        """Is `_current`. Read when the first changes come that an engine takes in place, and kept from then on."""

    @property
    def current(self) -> CopyState | None:
        return self._current

    def open(self) -> None:
        """Take the folder, clear what a killed replica left half done, and find its copy if that is intact.

        SettingsError if another replica works in it or it can't be written.
        """
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
                f"another replica keeps its weights in {self._folder}: give each a rollout.replica name of its own"
            ) from exc
        except OSError as exc:
            raise SettingsError(f"{self._folder} can't be written: {exc}; set rollout.weights_folder") from exc
        found = [entry for entry in sorted(self._folder.iterdir(), reverse=True) if _FOLDER.match(entry.name)]
        for folder in found:
            if self._disk is None and (state := _intact(folder)) is not None:
                self._current, self._disk, self._copied_at = state, (state, folder), state.version
                _log.info("a copy of weight version %d is intact", state.version)
            else:
                shutil.rmtree(folder)

    def close(self) -> None:
        """The copy on disk stays for the next start."""
        if self._lock is not None:
            self._lock.close()

    def stage(self, store: WeightStore, wanted: Manifest, *, with_changes: bool) -> Staged:
        """Make a version ready to be served: as changes to the current one where that is enough (`with_changes`: the
        engine serves the current version and takes them in place), or whole, by the changes since the current version
        or from the last full one.

        Where a later link of the way is missing or corrupt, the newest version before it, with its `trouble`.
        Raises WeightStoreError (OSError where the store is away) if nothing newer than the current one can be had.
        """
        links = store.chain(wanted.version, known=self._known(wanted))
        if not links:
            if (own := self._own(wanted)) is not None:
                return own
            return self._stage_whole(store, store.chain(wanted.version))
        try:
            if with_changes and links[0].form == "sparse":
                return self._stage_changes(store, links)
            return self._stage_whole(store, links)
        except MismatchError as exc:
            if links[0].form == "full":
                raise
            _log.warning("the own copy of the weights is not what it should be: %s", exc)
            return self._stage_whole(store, store.chain(wanted.version))

    def write(self, staged: Staged) -> Staged:
        """The same whole on disk, for an engine that did not take the changes."""
        if staged.folder is not None:
            return staged
        assert self._held is not None
        return replace(staged, folder=self._write(self._held, staged.state))

    def adopt(self, staged: Staged) -> None:
        """It is in service: what restored the version before it is deleted."""
        self._current = staged.state
        changes = [] if staged.changes is None else [staged.changes.file]
        if staged.folder is None:
            self._patches += changes
        else:
            self._settle(staged.state, staged.folder)
            self._replaced += changes
            if not changes:
                self._hold_again(staged.folder)
        for path in self._replaced:
            _delete(path)
        self._replaced.clear()

    def discard(self, staged: Staged) -> None:
        """The engine refused it: the version before it stays the one that changes are applied to."""
        if staged.changes is not None:
            assert self._held is not None
            self._held.undo(staged.changes.patches)
            staged.changes.file.unlink(missing_ok=True)
        if staged.folder is not None and (self._disk is None or staged.folder != self._disk[1]):
            shutil.rmtree(staged.folder, ignore_errors=True)

    def keep_up(self) -> None:
        """Write the copy on disk again if it is due. A copy that can't be written costs a restart, not the service."""
        if self._held is None or self._current is None or self._current.version < self._copied_at + COPY_EVERY:
            return
        self._copied_at = self._current.version
        if not self._held.is_intact():
            _log.error("the weights in memory are not what they were: check this machine's memory")
            self._give_up_memory()
            return
        try:
            self._settle(self._current, self._write(self._held, self._current))
        except OSError as exc:
            _log.warning("weight version %d could not be copied to disk: %s", self._current.version, exc)

    def _known(self, wanted: Manifest) -> int | None:
        """Only a version of the same epoch may be a base: numbers of another one say nothing."""
        return self._current.version if self._current and self._current.epoch == wanted.epoch else None

    def _own(self, wanted: Manifest) -> Staged | None:
        """The copy has the number of the version asked for; None if it is another run's version of that number."""
        if self._disk is None or self._disk[0] != CopyState.of(wanted):
            return None
        return Staged(*self._disk)

    def _stage_changes(self, store: WeightStore, links: Sequence[Manifest]) -> Staged:
        """Nothing of the size of the model is read or written here, but for the first time."""
        assert self._current is not None
        held = self._hold()
        temporary = self._make_room(links[-1].version)
        applied: list[TensorPatch] = []
        try:
            good, trouble = _fetch_links(store, links, temporary)
            began = time.perf_counter()
            for link in good:
                applied += held.apply(temporary / _link_name(link), link)
            changed = self._folder / f"{_folder_name(good[-1].version)}.patches"
            held.write_changes(changed, applied)
            metrics.weight_load_seconds.labels("patch").observe(time.perf_counter() - began)
        except BaseException:
            held.undo(applied)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        assert self._disk is not None
        changes = Changes(self._current.version, applied, changed, last_good=(self._disk[1], *self._patches))
        return Staged(CopyState.of(good[-1]), None, changes, trouble)

    def _stage_whole(self, store: WeightStore, links: Sequence[Manifest]) -> Staged:
        temporary = self._make_room(links[-1].version)
        try:
            good, trouble = _fetch_links(store, links, temporary)
            changes = [link for link in good if link.form == "sparse"]
            if changes:
                began = time.perf_counter()
                whole = HeldWeights.read(temporary / FULL_FILE) if good[0].form == "full" else self._copy_of_current()
                for link in changes:
                    file = temporary / _link_name(link)
                    whole.apply(file, link)
                    file.unlink()
                whole.write(temporary / FULL_FILE)
                metrics.weight_load_seconds.labels("patch").observe(time.perf_counter() - began)
            state = CopyState.of(good[-1])
            return Staged(state, self._name(temporary, state), trouble=trouble)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _hold(self) -> HeldWeights:
        """The current version in memory."""
        if self._held is None:
            self._held = self._read_disk()
        return self._held

    def _copy_of_current(self) -> HeldWeights:
        return self._read_disk() if self._held is None else self._held.copy()

    def _read_disk(self) -> HeldWeights:
        assert self._disk is not None, "a chain that begins sparse begins at the own copy"
        state, folder = self._disk
        held = HeldWeights.read(folder / FULL_FILE)
        if held.checksum != state.state_checksum:
            raise MismatchError(f"{folder} holds {held.checksum} and was {state.state_checksum}")
        return held

    def _hold_again(self, folder: Path) -> None:
        """Where changes were taken in place before, they will be again: the next ones find the new version in
        memory."""
        if self._held is None:
            return
        self._held = None
        try:
            self._held = HeldWeights.read(folder / FULL_FILE)
        except (OSError, WeightStoreError) as exc:
            _log.warning("%s can't be read into memory: %s", folder, exc)

    def _give_up_memory(self) -> None:
        """From now on changes apply to the copy on disk, until a whole version comes."""
        assert self._disk is not None
        self._held, self._current = None, self._disk[0]

    def _settle(self, state: CopyState, folder: Path) -> None:
        """This is the copy on disk; the one before it goes with the next version in service."""
        if self._disk is not None and self._disk[1] != folder:
            self._replaced.append(self._disk[1])
        self._replaced += self._patches
        self._disk, self._patches, self._copied_at = (state, folder), [], state.version

    def _make_room(self, version: int) -> Path:
        temporary = self._folder / f"{_folder_name(version)}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary

    def _write(self, held: HeldWeights, state: CopyState) -> Path:
        temporary = self._make_room(state.version)
        try:
            held.write(temporary / FULL_FILE)
            return self._name(temporary, state)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _name(self, temporary: Path, state: CopyState) -> Path:
        """Under its own name it is complete."""
        (temporary / _COPY).write_text(state.model_dump_json(), encoding="utf-8")
        folder = self._folder / _folder_name(state.version)
        if folder in [*self._replaced, *([self._disk[1]] if self._disk else [])]:  # of another epoch
            folder = folder.with_name(f"{folder.name}-2")
        _delete(folder)
        return temporary.rename(folder)


def _folder_name(version: int) -> str:
    return f"v{version:08d}"


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _link_name(link: Manifest) -> str:
    return f"{link.version}.{SPARSE_FILE}"


def _fetch_links(store: WeightStore, links: Sequence[Manifest], into: Path) -> tuple[list[Manifest], str]:
    """Those that arrived intact, up to the first that did not, and what was wrong with it."""
    good: list[Manifest] = []
    began = time.perf_counter()
    try:
        for link in links:
            _fetch_link(store, link, into)
            good.append(link)
    except WeightStoreError as exc:
        if not good:
            raise
        return good, str(exc)
    finally:
        metrics.weight_load_seconds.labels("fetch").observe(time.perf_counter() - began)
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


def _intact(folder: Path) -> CopyState | None:
    """The state of a copy that was found, None if it is not what it says."""
    try:
        state = CopyState.model_validate_json((folder / _COPY).read_bytes())
        right_place = folder.name.removesuffix("-2") == _folder_name(state.version)
        if right_place and state.state_checksum == state_checksum(map_state(folder / FULL_FILE)):
            return state
    except (OSError, ValidationError, WeightStoreError) as exc:
        _log.warning("the copy in %s can't be used: %s", folder, exc)
        return None
    _log.warning("the copy in %s is not what it says it is", folder)
    return None
