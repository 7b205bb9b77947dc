"""New weights while the service answers: swaps, refusals, catching up. Real store, engine, server and database."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa
from safetensors.torch import load, save
from torch import Tensor

from services.engine.base import Generation, Prompt, Sampling
from services.engine.hf.engine import TransformersEngine
from services.rollout.app import build_app
from services.rollout.watcher import WeightWatcher
from services.rollout.weight_copy import WeightCopy
from shared import metrics
from shared.api import RolloutResponse
from shared.coordination import AnnouncedWeights
from shared.database import EventRow, open_database, transaction
from shared.errors import StreamError
from shared.settings import EngineSettings
from shared.weights.store import WeightStore
from tests.services.fakes import FakeEngine
from tests.services.rollout.conftest import HEADERS, SECRETS, make_settings
from tests.services.serving import running, wait_until

BODY = {"token_ids": list(range(20, 60)), "starts": [16, 40], "num_rollouts": 2, "max_suffix_tokens": 32}


@contextmanager
def service(
    model: Path, folder: Path, *, engine: TransformersEngine | None = None
) -> Iterator[tuple[str, WeightStore]]:
    settings = make_settings(model, folder)
    with running(build_app(settings, SECRETS, engine=engine)) as url:
        yield url, WeightStore(settings.weight_store_url)


def ask(url: str, seed: int = 0) -> RolloutResponse:
    answer = httpx.post(f"{url}/v1/rollouts", json=BODY | {"seed": seed}, headers=HEADERS, timeout=30)
    assert answer.status_code == 200, answer.text
    return RolloutResponse.model_validate_json(answer.content)


def readiness(url: str) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{url}/status", headers=HEADERS, timeout=5).json()
    return found


def versions(answer: RolloutResponse) -> set[int]:
    return {rollout.weight_version for of_start in answer.rollouts for rollout in of_start}


def test_a_published_version_is_served(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        before = ask(url)
        store.publish({"model.safetensors": other_weights}, version=3, step=3)
        wait_until(lambda: readiness(url)["weight_version"] == 3, what="version 3")
        after = ask(url)
        assert (versions(before), versions(after)) == ({0}, {3})
        assert before.rollouts[0][0].token_ids != after.rollouts[0][0].token_ids


class BusyEngine(TransformersEngine):
    """Takes version 2 only while requests are being answered."""

    def __init__(self, model: Path) -> None:
        super().__init__(EngineSettings(model=str(model), device="cpu"))
        self.num_running = self.num_at_swap = 0
        """Requests that are being answered: now, and when version 2 came."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.num_running += 1
        try:
            return await super().generate(prompts, sampling)
        finally:
            self.num_running -= 1

    async def load_weights(self, folder: Path, version: int) -> None:
        while version == 2 and self.num_running < 4:  # noqa: ASYNC110 (a test's requests tell nobody)
            await asyncio.sleep(0.001)
        self.num_at_swap = self.num_running
        await super().load_weights(folder, version)


def test_a_swap_loses_no_request_in_flight(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    engine = BusyEngine(tiny_model)

    def ask_until_swapped(seed: int) -> list[RolloutResponse]:
        answers = [ask(url, seed)]
        while versions(answers[-1]) != {2}:
            answers.append(ask(url, seed))
        return answers

    with service(tiny_model, tmp_path, engine=engine) as (url, store), ThreadPoolExecutor(8) as pool:
        store.publish({"model.safetensors": (tiny_model / "model.safetensors").read_bytes()}, version=1, step=1)
        wait_until(lambda: readiness(url)["weight_version"] == 1, what="version 1")
        expected = {(1, seed): ask(url, seed) for seed in range(2)}
        asking = {pool.submit(ask_until_swapped, seed % 2): seed % 2 for seed in range(8)}
        store.publish({"model.safetensors": other_weights}, version=2, step=2)
        answers = [(seed, answer) for future, seed in asking.items() for answer in future.result(60)]
        expected |= {(2, seed): ask(url, seed) for seed in range(2)}
    assert engine.num_at_swap >= 4
    for seed, answer in answers:
        (version,) = versions(answer)
        assert answer == expected[version, seed]


def refused_total() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_refused_weights_total") or 0.0


def tensors_of(content: bytes) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load(content)
    return found


def wrong_shape(content: bytes) -> bytes:
    tensors = tensors_of(content)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    return save(tensors)


def missing_tensor(content: bytes) -> bytes:
    return save({name: tensor for name, tensor in tensors_of(content).items() if name != "model.norm.weight"})


def not_finite(content: bytes) -> bytes:
    tensors = tensors_of(content)
    tensors["model.norm.weight"][0] = float("nan")
    return save(tensors)


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "shape (5,)": wrong_shape,
    "missing": missing_tensor,
    "NaN": not_finite,
    "not a readable safetensors": lambda content: content[:1000],
}


@pytest.mark.parametrize("words", SPOILED)
def test_weights_that_do_not_fit_are_refused(
    tiny_model: Path, other_weights: bytes, tmp_path: Path, words: str
) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        before = ask(url)
        store.publish({"model.safetensors": SPOILED[words](other_weights)}, version=1, step=1)
        wait_until(lambda: "version 1 was refused" in str(readiness(url)["detail"]), what="the refusal")
        assert words in str(readiness(url)["detail"])
        assert readiness(url)["ready"]
        assert ask(url) == before


def test_a_corrupt_file_keeps_the_last_good_version_until_a_newer_one(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    with service(tiny_model, tmp_path) as (url, store):
        store.publish({"model.safetensors": other_weights}, version=1, step=1)
        wait_until(lambda: readiness(url)["weight_version"] == 1, what="version 1")
        counted, good = refused_total(), ask(url)
        publish_corrupt(store, other_weights, version=2)
        wait_until(lambda: "version 2 was refused" in str(readiness(url)["detail"]), what="the refusal")
        assert "corrupt" in str(readiness(url)["detail"])
        assert ask(url) == good
        assert refused_total() == counted + 1
        store.publish({"model.safetensors": other_weights}, version=3, step=3)
        wait_until(lambda: readiness(url)["weight_version"] == 3, what="version 3")
        assert readiness(url)["detail"] == ""
    events = read_events(tmp_path)
    assert [(event.kind, event.data["version"]) for event in events] == [("refused_weights", 2)]


def publish_corrupt(store: WeightStore, content: bytes, *, version: int) -> None:
    """A version whose manifest is right and whose file has one flipped byte; the manifest comes last, as always."""
    folder = Path(store.root) / f"v{version:08d}"
    donor = WeightStore(str(folder.parent.parent / "donor"))
    donor.publish({"model.safetensors": content}, version=version, step=version)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    manifest = Path(donor.root) / folder.name / "manifest.json"
    (folder / "manifest.json").write_bytes(manifest.read_bytes())


def read_events(folder: Path) -> list[EventRow]:
    engine = open_database(make_settings(Path("unused"), folder).database_url)
    with transaction(engine) as session:
        rows = list(session.scalars(sa.select(EventRow).order_by(EventRow.id)))
        session.expunge_all()
    engine.dispose()
    return rows


def test_a_new_replica_catches_up_before_it_is_ready(tiny_model: Path, other_weights: bytes, tmp_path: Path) -> None:
    store = WeightStore(make_settings(tiny_model, tmp_path).weight_store_url)
    store.publish({"model.safetensors": other_weights}, version=7, step=7)
    with service(tiny_model, tmp_path) as (url, _):
        assert readiness(url)["weight_version"] == 7
        assert versions(ask(url)) == {7}


def test_a_new_replica_goes_back_to_the_newest_good_version(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    store = WeightStore(make_settings(tiny_model, tmp_path).weight_store_url)
    store.publish({"model.safetensors": other_weights}, version=7, step=7)
    publish_corrupt(store, other_weights, version=8)
    with service(tiny_model, tmp_path) as (url, _):
        assert readiness(url)["weight_version"] == 7
        assert "version 8 was refused" in str(readiness(url)["detail"])


class RecordedEvents:
    def __init__(self) -> None:
        self.kinds: list[str] = []

    def record(self, kind: str, message: str, **data: object) -> None:
        self.kinds.append(kind)


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
    """A watcher on a fake engine, with announcements and a clock set by hand."""

    def __init__(self, store: WeightStore, folder: Path) -> None:
        self.engine, self.events = LoadingEngine(), RecordedEvents()
        self.now, self.announced, self.epoch, self.redis_is_up = 0.0, 0, "first", True
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.watcher = WeightWatcher(
            store=store,
            copy=WeightCopy(folder),
            engine=self.engine,
            announced=self._read,
            events=self.events,
            poll_interval_s=0.01,
            clock=lambda: self.now,
        )
        self.watcher.bind(self.loop)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    def _read(self) -> AnnouncedWeights:
        if not self.redis_is_up:
            raise StreamError("Redis: connection refused")
        return AnnouncedWeights(self.announced, self.epoch)


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    store = WeightStore(str(tmp_path / "store"))
    for version in (1, 2, 3):
        store.publish({"model.safetensors": b"content"}, version=version, step=version, epoch="first")
    return store


@pytest.fixture
def watched(store: WeightStore, tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "copy").mkdir()
    watched = Watched(store, tmp_path / "copy")
    yield watched
    watched.close()


def test_a_refused_version_is_tried_again_with_backoff(watched: Watched) -> None:
    watched.announced, watched.engine.failing_loads = 1, 2
    for now, failures_left in ((0.0, 1), (0.5, 1), (1.1, 0), (2.0, 0)):
        watched.now = now
        watched.watcher.check()
        assert watched.engine.failing_loads == failures_left
    watched.now = 3.2
    watched.watcher.check()
    assert (watched.engine.weight_version, watched.watcher.detail) == (1, "")
    assert watched.events.kinds == ["refused_weights"]


def test_a_newer_version_does_not_wait_for_the_backoff(watched: Watched) -> None:
    watched.announced, watched.engine.failing_loads = 1, 1
    watched.watcher.check()
    watched.announced = 2
    watched.watcher.check()
    assert (watched.engine.weight_version, watched.watcher.detail) == (2, "")


def test_a_pruned_version_gives_way_to_the_newest(watched: Watched, store: WeightStore) -> None:
    store.prune(keep=1)
    watched.announced = 2
    watched.watcher.check()
    assert watched.engine.weight_version == 3
    assert watched.events.kinds == []


def test_a_version_that_is_nowhere_is_refused(watched: Watched) -> None:
    watched.announced = 9
    watched.watcher.check()
    assert watched.engine.weight_version == 0
    assert "no complete weight version 9" in watched.watcher.detail


def test_without_redis_the_last_version_stays_and_the_detail_says_so(watched: Watched) -> None:
    watched.announced = 1
    watched.watcher.check()
    watched.redis_is_up = False
    watched.watcher.check()
    assert watched.engine.weight_version == 1
    assert "connection refused" in watched.watcher.detail
    watched.redis_is_up, watched.announced = True, 2
    watched.watcher.check()
    assert (watched.engine.weight_version, watched.watcher.detail) == (2, "")


def test_older_announcements_of_an_epoch_are_ignored(watched: Watched) -> None:
    """They are late news: within an epoch versions only ascend."""
    for announced in (3, 2):
        watched.announced = announced
        watched.watcher.check()
    assert watched.engine.weight_version == 3


def begin_anew(store: WeightStore, *versions: int) -> None:
    """The store is wiped, and a trainer that knows nothing of it begins."""
    shutil.rmtree(store.root)
    for version in versions:
        store.publish({"model.safetensors": b"another"}, version=version, step=version, epoch="second")


def test_a_version_of_another_epoch_is_taken_whatever_its_number(watched: Watched, store: WeightStore) -> None:
    """Lower, then the one after it; the number that was served before means nothing any more."""
    watched.announced = 3
    watched.watcher.check()
    begin_anew(store, 0, 1, 3)
    watched.epoch = "second"
    for announced in (0, 1, 3):
        watched.announced = announced
        watched.watcher.check()
        assert (watched.engine.weight_version, watched.watcher.detail) == (announced, "")
        assert watched.engine.loaded == (b"another", announced)


def test_the_same_number_in_another_epoch_is_another_version(watched: Watched, store: WeightStore) -> None:
    watched.announced = 3
    watched.watcher.check()
    assert watched.engine.loaded == (b"content", 3)
    begin_anew(store, 3)
    watched.epoch = "second"
    watched.watcher.check()
    assert watched.engine.loaded == (b"another", 3)


def test_a_store_of_another_epoch_than_the_announced_one_is_refused(watched: Watched) -> None:
    watched.announced = 2
    watched.watcher.check()
    watched.announced, watched.epoch = 3, "second"
    watched.watcher.check()
    assert watched.engine.loaded == (b"content", 2)
    assert "is of epoch first, the announced one is of epoch second" in watched.watcher.detail


def test_a_pruned_version_does_not_give_way_to_one_of_another_epoch(watched: Watched, store: WeightStore) -> None:
    watched.epoch, watched.announced = "second", 0
    watched.watcher.check()
    assert watched.engine.weight_version == 0
    assert "no complete weight version 0" in watched.watcher.detail


def test_a_copy_of_another_epoch_is_never_a_base(watched: Watched, store: WeightStore) -> None:
    """Neither for a sparse version that follows its number, nor as the version itself."""
    watched.announced = 3
    watched.watcher.check()
    shutil.rmtree(store.root)
    store.publish({"changes.zst": b""}, version=4, step=4, epoch="second", base=3, state_checksum="sum")
    watched.announced, watched.epoch = 4, "second"
    watched.watcher.check()
    assert watched.engine.loaded == (b"content", 3)
    assert "version 4 rests on 3: no complete weight version 3" in watched.watcher.detail


def test_versions_from_before_there_were_epochs_are_served_until_one_has_an_epoch(
    watched: Watched, store: WeightStore
) -> None:
    manifest = Path(store.root) / "v00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('  "epoch": "first",\n', ""))
    assert "epoch" not in manifest.read_text()
    watched.announced, watched.epoch = 2, ""
    watched.watcher.check()
    assert watched.engine.weight_version == 2
    watched.announced, watched.epoch = 3, "first"
    watched.watcher.check()
    assert (watched.engine.weight_version, watched.watcher.detail) == (3, "")


def test_manifests_of_the_tests_are_real(store: WeightStore) -> None:
    assert json.loads((Path(store.root) / "v00000003" / "manifest.json").read_text())["version"] == 3
