"""Sparse weight versions through the real service: every bit arrives, and nothing broken is ever served."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save

from services.engine.hf.engine import TransformersEngine
from services.rollout.app import build_app
from services.rollout.weight_copy import WeightCopy
from shared.api import RolloutResponse
from shared.engine_settings import EngineSettings
from shared.errors import SettingsError
from shared.weights.state import map_state, parse_state, state_checksum
from shared.weights.store import FULL_FILE, WeightStore
from tests.services.collector.processes import free_port
from tests.services.rollout.author import BROKEN, Author
from tests.services.rollout.conftest import HEADERS, SECRETS, counted, events_of, make_settings
from tests.services.serving import running, wait_until
from tests.services.test_service_processes import start

BODY = {"token_ids": list(range(20, 60)), "starts": [16, 40], "num_rollouts": 2, "max_suffix_tokens": 16, "seed": 3}


@pytest.fixture
def author(tiny_model: Path, tmp_path: Path) -> Author:
    return Author(WeightStore(make_settings(tiny_model, tmp_path).weight_store_url), tiny_model)


class RecordingEngine(TransformersEngine):
    """Notes how versions came in."""

    def __init__(self, model: Path) -> None:
        super().__init__(EngineSettings(model=str(model), device="cpu"))
        self.updates: list[tuple[str, int]] = []

    async def load_weights(self, folder: Path, version: int) -> None:
        await super().load_weights(folder, version)
        self.updates.append(("load", version))

    async def patch_weights(self, patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
        await super().patch_weights(patches, base=base, version=version, last_good=last_good)
        self.updates.append(("patch", version))


class Replica:
    """A running service, asked from outside."""

    def __init__(self, url: str, folder: Path, engine: RecordingEngine) -> None:
        self.url, self.folder, self.engine = url, folder, engine

    @property
    def readiness(self) -> dict[str, object]:
        found: dict[str, object] = httpx.get(f"{self.url}/status", headers=HEADERS, timeout=5).json()
        return found

    @property
    def detail(self) -> str:
        return str(self.readiness["detail"])

    def wait_for(self, version: int) -> None:
        wait_until(lambda: self.readiness["weight_version"] == version, what=f"version {version}")

    def ask(self) -> RolloutResponse:
        answer = httpx.post(f"{self.url}/v1/rollouts", json=BODY, headers=HEADERS, timeout=30)
        assert answer.status_code == 200, answer.text
        return RolloutResponse.model_validate_json(answer.content)

    def tokens(self) -> list[tuple[int, ...]]:
        return [rollout.token_ids for of_start in self.ask().rollouts for rollout in of_start]

    def versions(self) -> set[int]:
        return {rollout.weight_version for of_start in self.ask().rollouts for rollout in of_start}

    def served_checksum(self) -> str:
        """Of the weights that the engine answers with, in the published dtype."""
        (copy,) = self.copies()
        published = load_file(copy / FULL_FILE)
        own = self.engine._started.module.state_dict()
        content = save({name: own[name].to(tensor.dtype) for name, tensor in published.items()})
        return state_checksum(parse_state(content, where="the engine"))

    def copies(self) -> list[Path]:
        """The whole copy on its disk, which is what it says it is; nothing half made beside it."""
        wait_until(lambda: len(list(self.folder.glob("v*[0-9]"))) == 1, what="the older copy to go")
        found = list(self.folder.glob("v*[0-9]"))
        for copy in found:
            written = json.loads((copy / "copy.json").read_text())["state_checksum"]
            assert written == state_checksum(map_state(copy / FULL_FILE))
        return found


Start = Callable[..., AbstractContextManager[Replica]]


@pytest.fixture
def replica(tiny_model: Path, tmp_path: Path) -> Start:
    @contextmanager
    def start(name: str = "a", *, folder: Path = tmp_path) -> Iterator[Replica]:
        engine = RecordingEngine(tiny_model)
        with running(build_app(make_settings(tiny_model, folder, replica=name), SECRETS, engine=engine)) as url:
            yield Replica(url, folder / "test" / "replicas" / name, engine)

    return start


def test_changes_are_patched_in_and_equal_the_full_form_to_the_last_bit(replica: Start, author: Author) -> None:
    with replica() as early:
        author.full(1)
        early.wait_for(1)
        for version in (2, 3):
            author.sparse(version)
            early.wait_for(version)
            assert early.versions() == {version}
            assert early.served_checksum() == author.checksums[version]
        assert early.engine.updates == [("load", 1), ("patch", 2), ("patch", 3)]
        sparse = early.tokens()
        author.full(4, step=False)
        early.wait_for(4)
        assert early.engine.updates[-1] == ("load", 4)
        assert early.tokens() == sparse


def test_a_late_replica_finds_the_full_version_and_what_followed(replica: Start, author: Author) -> None:
    author.full(1)
    with replica("early") as early:
        for version in (2, 3, 4):
            author.sparse(version)
            early.wait_for(version)
        with replica("late") as late:
            assert late.engine.updates == [("load", 4)]
            assert late.tokens() == early.tokens()
            assert late.served_checksum() == early.served_checksum() == author.checksums[4]
            author.sparse(5)
            for either in (early, late):
                either.wait_for(5)
            assert late.tokens() == early.tokens()


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_update_leaves_the_last_good_version_and_the_next_full_one_heals(
    replica: Start, author: Author, tmp_path: Path, words: str
) -> None:
    author.full(1)
    with replica() as one:
        author.sparse(2)
        one.wait_for(2)
        before, refused = one.tokens(), counted("refused_weights")
        BROKEN[words](author, 4)
        wait_until(lambda: "version 4 was refused" in one.detail, what="the refusal")
        assert words in one.detail
        assert one.readiness["ready"]
        assert (one.tokens(), one.versions()) == (before, {2})
        assert one.served_checksum() == author.checksums[2]
        assert counted("refused_weights") == refused + 1
        author.full(5)
        one.wait_for(5)
        assert one.detail == ""
        assert one.served_checksum() == author.checksums[5]
    assert events_of(tmp_path) == [("refused_weights", 4)]


def test_what_rests_on_a_broken_version_is_refused_until_it_is_mended(replica: Start, author: Author) -> None:
    good: list[bytes] = []

    def keep_and_cut(content: bytes) -> bytes:
        good.append(content)
        return content[:10]

    author.full(1)
    with replica() as one:
        author.sparse_damaged(2, keep_and_cut)
        author.sparse(3)
        wait_until(lambda: "version 3 was refused" in one.detail, what="the refusal")
        assert one.versions() == {1}
        author.file(2).write_bytes(good[0])
        one.wait_for(3)
        assert one.served_checksum() == author.checksums[3]


def test_a_broken_link_is_approached_as_far_as_the_way_is_good(replica: Start, author: Author) -> None:
    author.full(1)
    author.sparse(2)
    author.sparse(3)
    author.sparse(4)
    author.file(4).write_bytes(b"")
    with replica() as late:
        assert late.versions() == {3}
        assert "version 4 was refused" in late.detail
        assert late.served_checksum() == author.checksums[3]


def test_a_copy_that_was_damaged_on_disk_is_replaced_from_the_last_full_version(replica: Start, author: Author) -> None:
    author.full(1)
    author.sparse(2)
    with replica() as one:
        (copy,) = one.folder.glob(f"v*/{FULL_FILE}")
        content = copy.read_bytes()
        copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        author.sparse(3)
        one.wait_for(3)
        assert one.served_checksum() == author.checksums[3]
        assert one.detail == ""
        assert one.engine.updates[-1] == ("load", 3)


def test_a_patch_that_the_engine_cannot_take_is_loaded_as_a_whole(replica: Start, author: Author) -> None:
    author.full(1)
    with replica() as one:
        failed, original = counted("failed_patches"), one.engine.patch_weights

        async def of_another_base(patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
            await original(patches, base=base + 100, version=version, last_good=last_good)

        one.engine.patch_weights = of_another_base  # type: ignore[method-assign]
        author.sparse(2)
        one.wait_for(2)
        assert one.engine.updates == [("load", 1), ("load", 2)]
        assert counted("failed_patches") == failed + 1
        assert one.detail == ""


def test_a_version_without_changes_is_a_version(replica: Start, author: Author) -> None:
    author.full(1)
    with replica() as one:
        before = one.tokens()
        author.publish_changes(2, [])
        one.wait_for(2)
        assert (one.tokens(), one.versions()) == (before, {2})


def test_a_replica_that_starts_again_goes_on_from_its_own_copy(replica: Start, author: Author) -> None:
    author.full(1)
    author.sparse(2)
    with replica() as first:
        assert first.versions() == {2}
    author.file(1).unlink()  # nobody can begin at the full version any more
    author.sparse(3)
    with replica() as second:
        assert second.versions() == {3}
        assert second.served_checksum() == author.checksums[3]


@pytest.mark.parametrize("newest", [1, 2])
def test_a_copy_of_another_run_is_not_served(
    replica: Start, tiny_model: Path, author: Author, tmp_path: Path, newest: int
) -> None:
    """Neither where it has the number of the newest version, nor as the base of changes."""
    author.step(share=0.5)
    author.full(1)
    with replica() as first:
        first.wait_for(1)
    other = Author(WeightStore(make_settings(tiny_model, tmp_path / "other").weight_store_url), tiny_model)
    other.full(1)
    if newest == 2:
        other.sparse(2)
    assert author.checksums[1] != other.checksums[1]
    (tmp_path / "other/test/replicas").mkdir(parents=True)
    (tmp_path / "test/replicas/a").rename(tmp_path / "other/test/replicas/a")
    with replica(folder=tmp_path / "other") as second:
        assert second.versions() == {newest}
        assert second.served_checksum() == other.checksums[newest]
        assert second.detail == ""


def test_two_replicas_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = WeightCopy(tmp_path), WeightCopy(tmp_path)
    first.open()
    with pytest.raises(SettingsError, match=r"another rollout\.replica name"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_what_a_killed_replica_left_half_done_is_cleared(tmp_path: Path, author: Author) -> None:
    author.full(1)
    killed, copy = WeightCopy(tmp_path / "copy"), WeightCopy(tmp_path / "copy")
    killed.open()
    killed.adopt(killed.stage(author.store, author.store.manifest(1), with_changes=False))
    killed.close()
    whole = tmp_path / "copy/v00000001"
    shutil.copytree(whole, tmp_path / "copy/v00000003.tmp")
    shutil.copytree(whole, tmp_path / "copy/v00000002")  # intact, but not what its name says
    damaged = tmp_path / "copy/v00000004"
    damaged.mkdir()
    (damaged / "copy.json").write_text((whole / "copy.json").read_text().replace('"version":1', '"version":4'))
    (damaged / FULL_FILE).write_bytes(author.content()[:-1] + b"\xff")
    (tmp_path / "copy/v00000002.patches").write_bytes(b"half")
    copy.open()
    assert copy.current is not None
    assert copy.current.version == 1
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {".lock", "v00000001"}
    copy.close()


@pytest.mark.slow
def test_a_replica_killed_in_mid_update_starts_again_and_catches_up(
    tiny_model: Path, author: Author, tmp_path: Path
) -> None:
    """Killed as soon as it begins to stage a version; where exactly does not matter."""
    author.full(1)
    folder = tmp_path / "test/replicas/a"
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = ["--policy.model", str(tiny_model), "--run.name", "test", "--run.directory", str(tmp_path)]
    words += ["--rollout.replica", "a", "--rollout.port", str(port), "--rollout.poll_interval_s", "0.01"]
    process = start(*words)
    try:
        wait_until(lambda: served(url) == 1, what="version 1", timeout_s=120)
        author.sparse(2)
        until = time.monotonic() + 10
        while not any(folder.glob("*.tmp")) and time.monotonic() < until and served(url) != 2:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    finally:
        end(process)
    process = start(*words)
    try:
        wait_until(lambda: served(url) == 2, what="version 2", timeout_s=120)
        assert not list(folder.glob("*.tmp"))
        (copy,) = folder.glob("v*[0-9]")
        assert state_checksum(map_state(copy / FULL_FILE)) == author.checksums[2]
    finally:
        end(process)


def served(url: str) -> int | None:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5)
    except httpx.TransportError:
        return None
    return int(answer.json()["weight_version"]) if answer.status_code == 200 else None


def end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
