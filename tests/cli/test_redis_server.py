"""The embedded Redis: only the run's token opens it, and what it has answered survives a SIGKILL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from cli.plan import child_environ
from cli.ports import Ports
from cli.processes import Child
from cli.redis_server import (
    HOST,
    answers,
    find_redis_server,
    redis_url,
    server_configuration,
    wait_until_it_answers,
)
from shared.errors import HeadwaterError

PASSWORD = 'a "quoted" \\ pässword/@'


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    with Ports() as ports:
        port = ports.take(HOST, 0)
        server = Child("redis", [find_redis_server(), "-"], log=folder / "log", environ=child_environ())
        server.start(standard_input=server_configuration(folder, port=port, password=PASSWORD))
        try:
            url = redis_url(port, PASSWORD)
            wait_until_it_answers(url, timeout_s=30.0, alive=lambda: server.is_running)
            yield url
        finally:
            server.kill()


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    with _server(folder) as url, redis.Redis.from_url(url) as client:
        client.xadd("stream", {"id": "1"})
    with _server(folder) as url, redis.Redis.from_url(url) as client:
        assert client.xlen("stream") == 1


def test_nobody_gets_in_without_the_password(tmp_path: Path) -> None:
    with _server(tmp_path) as url:
        assert answers(url)
        without_password = f"redis://{url.rpartition('@')[2]}"
        with pytest.raises(HeadwaterError, match="password"):
            answers(without_password)


def test_a_server_that_died_is_not_waited_for() -> None:
    with pytest.raises(HeadwaterError, match="ended before it answered"):
        wait_until_it_answers("redis://127.0.0.1:1/0", timeout_s=30.0, alive=lambda: False)
