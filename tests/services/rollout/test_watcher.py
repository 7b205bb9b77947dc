"""The watcher on a fake engine: what it loads, refuses and retries as announcements come in."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.rollout.watcher import WeightWatcher
from services.rollout.weight_copy import WeightCopy
from shared.coordination import AnnouncedWeights
from shared.errors import StreamError
from shared.weights.store import FULL_FILE, MANIFEST, SPARSE_FILE, WeightStore
from tests.services.fakes import FakeEngine


class LoadingEngine(FakeEngine):
    """Remembers the file that it was given last, and as which version. It must still be there at the next update."""

    loaded: tuple[bytes, int] | None = None
    file: Path | None = None

    async def load_weights(self, folder: Path, version: int) -> None:
        if self.loaded is not None and self.file is not None:
            assert self.file.read_bytes() == self.loaded[0]
        await super().load_weights(folder, version)
        self.file = folder / "model.safetensors"
        self.loaded = self.file.read_bytes(), version


class Watched:
    """A watcher whose announcements and clock are set by hand."""

    def __init__(self, store: WeightStore, folder: Path) -> None:
        self.engine = LoadingEngine()
        self.events: list[str] = []
        self.now, self.redis_is_up = 0.0, True
        self.announced = AnnouncedWeights(0, "first")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.watcher = WeightWatcher(
            store=store,
            copy=WeightCopy(folder),
            engine=self.engine,
            announced=self._read,
            record_event=lambda kind, message, **data: self.events.append(kind),
            poll_interval_s=0.01,
            clock=lambda: self.now,
        )
        self.watcher.bind(self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    def hear(self, version: int, epoch: str = "first") -> int:
        """The version in service once this one was announced and looked at."""
        self.announced = AnnouncedWeights(version, epoch)
        self.watcher.check()
        return self.engine.weight_version

    def _read(self) -> AnnouncedWeights:
        if not self.redis_is_up:
            raise StreamError("Redis: connection refused")
        return self.announced


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    store = WeightStore(str(tmp_path / "store"))
    for version in (1, 2, 3):
        store.publish({FULL_FILE: b"content"}, version=version, step=version, epoch="first")
    return store


@pytest.fixture
def watched(store: WeightStore, tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "copy").mkdir()
    watched = Watched(store, tmp_path / "copy")
    yield watched
    watched.close()


def start_over(store: WeightStore, *versions: int) -> None:
    """The store is wiped, and a trainer that knows nothing of it publishes."""
    shutil.rmtree(store.root)
    for version in versions:
        store.publish({FULL_FILE: b"another"}, version=version, step=version, epoch="second")


def test_a_refused_version_is_tried_again_with_backoff(watched: Watched) -> None:
    watched.engine.failing_loads = 2
    for now, failures_left in ((0.0, 1), (0.5, 1), (1.1, 0), (2.0, 0)):
        watched.now = now
        watched.hear(1)
        assert watched.engine.failing_loads == failures_left
    watched.now = 3.2
    assert (watched.hear(1), watched.watcher.detail) == (1, "")
    assert watched.events == ["refused_weights"]


def test_a_newer_version_does_not_wait_for_the_backoff(watched: Watched) -> None:
    watched.engine.failing_loads = 1
    assert watched.hear(1) == 0
    assert (watched.hear(2), watched.watcher.detail) == (2, "")


def test_a_pruned_version_gives_way_to_the_newest_of_its_epoch(watched: Watched, store: WeightStore) -> None:
    store.prune(keep=1)
    assert watched.hear(2) == 3
    assert watched.events == []


@pytest.mark.parametrize("announced", [AnnouncedWeights(9, "first"), AnnouncedWeights(0, "second")])
def test_a_version_that_is_nowhere_is_refused(watched: Watched, announced: AnnouncedWeights) -> None:
    assert watched.hear(announced.version, announced.epoch) == 0
    assert f"no complete weight version {announced.version}" in watched.watcher.detail


def test_without_redis_the_last_version_stays_and_the_detail_says_so(watched: Watched) -> None:
    watched.hear(1)
    watched.redis_is_up = False
    assert watched.hear(2) == 1
    assert "connection refused" in watched.watcher.detail
    watched.redis_is_up = True
    assert (watched.hear(2), watched.watcher.detail) == (2, "")


def test_older_announcements_of_an_epoch_are_ignored(watched: Watched) -> None:
    assert [watched.hear(version) for version in (3, 2)] == [3, 3]


@pytest.mark.parametrize("versions", [(0, 1, 3), (3,)])
def test_a_version_of_another_epoch_is_taken_whatever_its_number(
    watched: Watched, store: WeightStore, versions: tuple[int, ...]
) -> None:
    assert watched.hear(3) == 3
    assert watched.engine.loaded == (b"content", 3)
    start_over(store, *versions)
    for version in versions:
        assert (watched.hear(version, "second"), watched.watcher.detail) == (version, "")
        assert watched.engine.loaded == (b"another", version)


def test_a_store_of_another_epoch_than_the_announced_one_is_refused(watched: Watched) -> None:
    watched.hear(2)
    assert watched.hear(3, "second") == 2
    assert "is of epoch first, the announced one is of epoch second" in watched.watcher.detail


def test_a_copy_of_another_epoch_is_never_a_base(watched: Watched, store: WeightStore) -> None:
    watched.hear(3)
    shutil.rmtree(store.root)
    store.publish({SPARSE_FILE: b""}, version=4, step=4, epoch="second", base=3, state_checksum="sum")
    assert watched.hear(4, "second") == 3
    assert "version 4 rests on 3: no complete weight version 3" in watched.watcher.detail


def test_versions_without_an_epoch_are_served_until_one_has_an_epoch(watched: Watched, store: WeightStore) -> None:
    """Stores from before there were epochs."""
    manifest = Path(store.root) / "v00000002" / MANIFEST
    manifest.write_text(manifest.read_text().replace('  "epoch": "first",\n', ""))
    assert "epoch" not in manifest.read_text()
    assert watched.hear(2, "") == 2
    assert (watched.hear(3, "first"), watched.watcher.detail) == (3, "")
