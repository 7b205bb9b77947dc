"""Replicas and Redis: announced versions are loaded, heartbeats tell who lives, and Redis may go away."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.rollout.app import build_app
from shared.coordination import Coordination
from shared.redis import connect
from shared.settings import RedisSettings, Settings
from shared.weights.store import FULL_FILE, WeightStore
from tests.services.collector.processes import RedisProcess
from tests.services.rollout.conftest import HEADERS, SECRETS, make_settings
from tests.services.serving import running, wait_until


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def coordination(redis_server: RedisProcess) -> Iterator[Coordination]:
    """The trainer's side of run `test`."""
    client = connect(redis_server.url, timeout_s=5)
    yield Coordination(client, "test")
    client.close()


def with_redis(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"redis": RedisSettings(url=url)})


def test_announced_versions_are_loaded_and_outlive_redis(
    tiny_model: Path, other_weights: bytes, tmp_path: Path, redis_server: RedisProcess, coordination: Coordination
) -> None:
    settings = with_redis(make_settings(tiny_model, tmp_path), redis_server.url)
    with running(build_app(settings, SECRETS)) as url:
        WeightStore(settings.weight_store_url).publish({FULL_FILE: other_weights}, version=4, step=4)
        coordination.announce_weights(4)
        wait_until(lambda: httpx.get(f"{url}/readyz").json()["weight_version"] == 4, what="version 4")
        redis_server.stop()
        summary = "can't look for new weights"
        wait_until(lambda: httpx.get(f"{url}/readyz").json()["detail"] == summary, what="the detail")
        full = httpx.get(f"{url}/status", headers=HEADERS).json()["detail"]
        assert full.startswith(f"{summary}: Redis: ")
        assert httpx.get(f"{url}/readyz").json()["ready"]


def test_replicas_say_that_they_live_and_what_they_serve(
    tiny_model: Path, other_weights: bytes, tmp_path: Path, redis_server: RedisProcess, coordination: Coordination
) -> None:
    first, second = (
        with_redis(make_settings(tiny_model, tmp_path, replica=name, heartbeat_s=0.6), redis_server.url)
        for name in ("first", "second")
    )
    with running(build_app(first, SECRETS)):
        wait_until(lambda: coordination.live_replicas() == {"first": 0}, what="the first replica")
        with running(build_app(second, SECRETS)):
            WeightStore(first.weight_store_url).publish({FULL_FILE: other_weights}, version=2, step=2)
            coordination.announce_weights(2)
            wait_until(lambda: coordination.live_replicas() == {"first": 2, "second": 2}, what="both at 2")
            time.sleep(0.8)  # longer than one heartbeat lives
            assert coordination.live_replicas() == {"first": 2, "second": 2}
        assert coordination.live_replicas() == {"first": 2}
    assert coordination.live_replicas() == {}
