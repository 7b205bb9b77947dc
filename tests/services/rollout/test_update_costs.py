"""A sparse update costs a replica what changed, counted by the kernel in bytes read and written."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.engine.weights import read_patches
from services.rollout.weight_copy import WeightCopy
from services.rollout.weights import WeightWatcher
from shared.weight_patches import encode_patches, find_patches
from shared.weight_state import BitTensor, State, state_checksum, write_state
from shared.weight_store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.services.fakes import FakeEngine

NUM_ELEMENTS = 8 << 20
"""16 MiB in bfloat16."""
NUM_CHANGED = 2_000


class PatchableFake(FakeEngine):
    """Holds the one tensor and takes changes in place."""

    can_patch = True
    bits: NDArray[np.uint16]

    async def load_weights(self, folder: Path, version: int) -> None:
        content = (folder / FULL_FILE).read_bytes()
        self.bits = np.frombuffer(content[-2 * NUM_ELEMENTS :], np.uint16).copy()
        self.weight_version = version

    async def patch_weights(self, patches: Path, *, base: int, version: int) -> None:
        assert base == self.weight_version
        (patch,) = read_patches(patches)
        self.bits[patch.indices.numpy()] = patch.values.view(torch.int16).numpy().view(np.uint16)
        self.weight_version = version


class NoEvents:
    def record(self, kind: str, message: str, **data: object) -> None:
        raise AssertionError(message)


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
        before = self.state()
        self.bits[self.draw.choice(NUM_ELEMENTS, NUM_CHANGED, replace=False)] += 1
        files = {SPARSE_FILE: encode_patches(find_patches(before, self.state()), before)}
        checksum = state_checksum(self.state())
        self.store.publish(files, version=version, step=version, base=version - 1, state_checksum=checksum)


@contextmanager
def watching(author: Author, folder: Path, engine: FakeEngine) -> Iterator[WeightWatcher]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    watcher = WeightWatcher(
        store=author.store,
        copy=WeightCopy(folder),
        engine=engine,
        announced=None,
        events=NoEvents(),
        poll_interval_s=1.0,
    )
    watcher.bind(loop)
    watcher.catch_up()
    yield watcher
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def bytes_moved() -> int:
    """Read and written by this process so far."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("rchar:") + 1]) + int(words[words.index("wchar:") + 1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel counts no bytes here")
def test_a_sparse_update_reads_and_writes_what_changed(tmp_path: Path) -> None:
    author, engine = Author(tmp_path), PatchableFake()
    author.full(1)
    with watching(author, tmp_path / "copy", engine) as watcher:
        moved = []
        for version in (2, 3, 4):
            author.sparse(version)
            before = bytes_moved()
            watcher.check()
            moved.append(bytes_moved() - before)
            assert engine.weight_version == version
            assert np.array_equal(engine.bits, author.bits)
    assert max(moved[1:]) < 100_000, (
        moved
    )  # 10 bytes a change for the engine, less from the store; 16 MiB are the model
