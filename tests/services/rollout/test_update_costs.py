"""A sparse update costs a replica what changed, counted by the kernel in bytes read and written."""

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.engine.weights import read_patches
from services.rollout.watcher import WeightWatcher
from services.rollout.weight_copy import COPY_EVERY, WeightCopy
from shared.errors import EngineError
from shared.weights.patches import encode_patches
from shared.weights.state import BitTensor, State, map_state, state_checksum, write_state
from shared.weights.store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.services.fakes import FakeEngine
from tests.services.rollout.author import checksum_of_changed
from tests.shared.weights.states import find_patches

NUM_ELEMENTS = 1 << 20
"""2 MiB in bfloat16."""
NUM_CHANGED = 2_000


class PatchableFake(FakeEngine):
    """Holds the one tensor and takes changes in place."""

    can_patch = True
    bits: NDArray[np.uint16]

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[str, int]] = []
        self.refused: set[tuple[str, int]] = set()
        """Updates that fail half way, each once."""
        self._served: list[Path] = []

    def _note(self, kind: str, version: int) -> None:
        if (kind, version) in self.refused:
            self.refused.remove((kind, version))
            self._restore()
            raise EngineError(f"{kind} {version} does not fit")
        self.updates.append((kind, version))
        self.weight_version = version

    def _restore(self) -> None:
        folder, *patches = self._served
        self._load(folder)
        for patch in patches:
            self._patch(patch)

    async def load_weights(self, folder: Path, version: int) -> None:
        self._note("load", version)
        self._load(folder)
        self._served = [folder]

    async def patch_weights(self, patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
        assert base == self.weight_version
        self._served = [*last_good]
        self._note("patch", version)
        self._patch(patches)
        self._served.append(patches)

    def _load(self, folder: Path) -> None:
        content = (folder / FULL_FILE).read_bytes()
        self.bits = np.frombuffer(content[-2 * NUM_ELEMENTS :], np.uint16).copy()

    def _patch(self, file: Path) -> None:
        (patch,) = read_patches(file)
        self.bits[patch.indices.numpy()] = patch.values.view(torch.int16).numpy().view(np.uint16)


class Author:
    """One tensor, a few elements of which move at each version."""

    def __init__(self, folder: Path) -> None:
        self.store = WeightStore(str(folder / "store"))
        self.folder = folder
        self.draw = np.random.default_rng(0)
        self.bits = self.draw.integers(0, 1 << 14, NUM_ELEMENTS, np.uint16)

    def state(self) -> State:
        return {"x": BitTensor("BF16", (NUM_ELEMENTS,), self.bits.copy())}

    def full(self, version: int) -> None:
        write_state(self.folder / "whole", self.state(), {})
        files = {FULL_FILE: (self.folder / "whole").read_bytes()}
        self.store.publish(files, version=version, step=version, state_checksum=state_checksum(self.state()))

    def sparse(self, version: int) -> None:
        bits = self.bits.copy()
        bits[self.draw.choice(NUM_ELEMENTS, NUM_CHANGED, replace=False)] += 1
        self.publish(version, bits)

    def publish(self, version: int, bits: NDArray[np.uint16]) -> None:
        """As what changed since the version before."""
        before, self.bits = self.state(), bits
        patches = find_patches(before, self.state())
        self.store.publish(
            {SPARSE_FILE: encode_patches(patches, before)},
            version=version,
            step=version,
            base=version - 1,
            state_checksum=state_checksum(self.state()),
            changed_checksum=checksum_of_changed(patches, before),
        )


@contextmanager
def watching(author: Author, folder: Path, engine: PatchableFake) -> Iterator[WeightWatcher]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    copy = WeightCopy(folder)
    watcher = WeightWatcher(
        store=author.store,
        copy=copy,
        engine=engine,
        announced=None,
        record_event=lambda *given, **data: None,  # refusals show in `detail`
        poll_interval_s=1.0,
        clock=itertools.count(step=100.0).__next__,  # whatever was refused may be tried again
    )
    watcher.bind(loop)
    watcher.catch_up()
    yield watcher
    copy.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@contextmanager
def following(folder: Path) -> Iterator[tuple[Author, WeightWatcher, PatchableFake]]:
    """An engine that serves the full version 1."""
    author, engine = Author(folder), PatchableFake()
    author.full(1)
    with watching(author, folder / "copy", engine) as watcher:
        yield author, watcher, engine


def bytes_moved() -> int:
    """Read and written by this process so far."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1]) + int(words[words.index("wchar:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes here")
def test_a_sparse_update_reads_and_writes_what_changed(tmp_path: Path) -> None:
    with following(tmp_path) as (author, watcher, engine):
        moved = []
        for version in (2, 3, 4):
            author.sparse(version)
            before = bytes_moved()
            watcher.check()
            moved.append(bytes_moved() - before)
            assert engine.weight_version == version
            assert np.array_equal(engine.bits, author.bits)
    # 10 bytes a change for the engine, less from the store; the model has 2 MiB
    assert max(moved[1:]) < 100_000, moved


def copies(folder: Path) -> list[str]:
    """Whole versions on the replica's disk."""
    return [path.name for path in (folder / "copy").glob("v*[0-9]")]


def follow(author: Author, watcher: WeightWatcher, engine: PatchableFake, versions: range) -> None:
    for version in versions:
        author.sparse(version)
        watcher.check()
        assert engine.weight_version == version, watcher.detail
    assert np.array_equal(engine.bits, author.bits)


def test_versions_that_came_meanwhile_are_patched_in_at_once(tmp_path: Path) -> None:
    """Elements that moved twice among them, and others that moved and came back."""
    with following(tmp_path) as (author, watcher, engine):
        for version in (2, 3):
            author.sparse(version)
        back = author.bits.copy()
        author.sparse(4)
        author.publish(5, back)
        watcher.check()
    assert engine.updates == [("load", 1), ("patch", 5)]
    assert np.array_equal(engine.bits, back)


def test_the_copy_on_disk_is_written_again_when_it_is_old_and_a_restart_begins_with_it(tmp_path: Path) -> None:
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, COPY_EVERY + 1))
        watcher.check()  # nothing new
        assert copies(tmp_path) == ["v00000001"]
        follow(author, watcher, engine, range(COPY_EVERY + 1, COPY_EVERY + 2))
        watcher.check()
        copy = tmp_path / f"copy/v{COPY_EVERY + 1:08d}"
        assert state_checksum(map_state(copy / FULL_FILE)) == state_checksum(author.state())
        follow(author, watcher, engine, range(COPY_EVERY + 2, COPY_EVERY + 4))
        assert copies(tmp_path) == [copy.name]
    for version in range(1, COPY_EVERY + 2):
        for name in (FULL_FILE, SPARSE_FILE):  # nobody can begin there any more
            (Path(author.store.root) / f"v{version:08d}" / name).unlink(missing_ok=True)
    restarted = PatchableFake()
    with watching(author, tmp_path / "copy", restarted):
        assert restarted.updates == [("load", COPY_EVERY + 3)]
        assert np.array_equal(restarted.bits, author.bits)


@pytest.mark.parametrize("served", [2, COPY_EVERY + 1], ids=["patched", "copied"])
def test_what_the_engine_refused_altogether_is_taken_back(tmp_path: Path, served: int) -> None:
    """Changes refused, then the whole version too: the engine can restore what it served, also where the copy on disk
    was just written again, and the next version still applies to it."""
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, served + 1))
        watcher.check()  # nothing new
        bits = engine.bits.copy()
        engine.refused = {("patch", served + 1), ("load", served + 1)}
        author.sparse(served + 1)
        watcher.check()
        assert f"version {served + 1} was refused: load {served + 1} does not fit" in watcher.detail
        assert (engine.weight_version, np.array_equal(engine.bits, bits)) == (served, True)
        follow(author, watcher, engine, range(served + 2, served + 4))
        assert watcher.detail == ""
    assert engine.updates[-3:] == [("patch", version) for version in (served, served + 2, served + 3)]
    assert copies(tmp_path) == ["v00000001" if served == 2 else f"v{served:08d}"]


def test_an_engine_that_takes_no_more_changes_can_still_restore_those_it_took(tmp_path: Path) -> None:
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, COPY_EVERY + 2))
        watcher.check()  # the copy on disk is written again
        bits = engine.bits.copy()
        engine.can_patch, engine.refused = False, {("load", COPY_EVERY + 2)}
        author.sparse(COPY_EVERY + 2)
        watcher.check()
        assert np.array_equal(engine.bits, bits)
        follow(author, watcher, engine, range(COPY_EVERY + 3, COPY_EVERY + 4))
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {".lock", f"v{COPY_EVERY + 3:08d}"}


def test_weights_that_rot_in_memory_are_noticed_when_changes_meet_them(tmp_path: Path) -> None:
    """The version is built again from the last full one, and loaded whole."""
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, 3))
        held = watcher.copy._held
        assert held is not None
        held._state["x"].bits[:] ^= 4
        follow(author, watcher, engine, range(3, 5))
    assert engine.updates == [("load", 1), ("patch", 2), ("load", 3), ("patch", 4)]


def test_weights_that_rot_in_memory_are_never_written_to_disk(tmp_path: Path) -> None:
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, COPY_EVERY + 2))
        held = watcher.copy._held
        assert held is not None
        held._state["x"].bits[7] ^= 4
        watcher.check()
        assert copies(tmp_path) == ["v00000001"]
        follow(author, watcher, engine, range(COPY_EVERY + 2, COPY_EVERY + 4))
    assert engine.updates[-2:] == [("load", COPY_EVERY + 2), ("patch", COPY_EVERY + 3)]


def test_an_engine_that_stops_taking_changes_gets_whole_versions(tmp_path: Path) -> None:
    with following(tmp_path) as (author, watcher, engine):
        follow(author, watcher, engine, range(2, 4))
        engine.can_patch = False
        follow(author, watcher, engine, range(4, 6))
        assert copies(tmp_path) == ["v00000005"]
    assert engine.updates == [("load", 1), ("patch", 2), ("patch", 3), ("load", 4), ("load", 5)]
