"""What a run's Redis knows, for `headwater audit`: from Redis itself, or from a copy of its file."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cli.plan import child_environ
from cli.ports import Ports
from cli.processes import Child, stop_children
from cli.redis_server import HOST, find_redis_server, redis_url, server_configuration, wait_until_it_answers
from cli.run_folder import RunFolder
from shared.coordination import Coordination
from shared.errors import HeadwaterError, StreamError, StreamSchemaError
from shared.http import generate_token
from shared.redis import connect
from shared.settings import Settings
from shared.stream import WindowStream

_START_S = 60.0
_log = logging.getLogger(__name__)


class StreamUnreachable(HeadwaterError):
    """The stream can't be read; the audit says so instead of guessing."""


@dataclass(frozen=True)
class OnStream:
    documents: frozenset[str]
    """Ids of all documents on the stream, delivered or not."""
    leased: frozenset[int]
    """Parts of the source that a collector holds."""


def read_stream(settings: Settings, folder: RunFolder) -> OnStream:
    """Raises StreamUnreachable."""
    if settings.redis.url:
        return _read(settings.redis.url, settings)
    if not any(folder.redis.glob("*")):
        return OnStream(frozenset(), frozenset())  # the run never had a stream
    with _copy_served(folder.redis) as url:
        return _read(url, settings)


def _read(url: str, settings: Settings) -> OnStream:
    client, run_id = connect(url, timeout_s=5.0), settings.run.name
    try:
        leased = Coordination(client, run_id).leased_parts(num_parts=settings.documents.num_parts)
        return OnStream(frozenset(WindowStream(client, run_id).entries().values()), frozenset(leased))
    except (StreamError, StreamSchemaError) as exc:
        raise StreamUnreachable(str(exc)) from exc
    finally:
        client.close()


@contextmanager
def _copy_served(source: Path) -> Iterator[str]:
    """A Redis that serves a copy of an embedded Redis's folder."""
    password = generate_token()
    with tempfile.TemporaryDirectory(prefix="headwater-audit-") as name, Ports() as ports:
        folder = Path(name)
        shutil.copytree(source, folder / "redis")
        port = ports.take(HOST, 0)
        server = Child("redis", [find_redis_server(), "-"], log=folder / "redis.log", environ=child_environ())
        server.start(standard_input=server_configuration(folder / "redis", port=port, password=password))
        try:
            url = redis_url(port, password)
            _wait(server, url)
            yield url
        finally:
            stop_children([server], timeout_s=10.0, hurried=lambda: False)


def _wait(server: Child, url: str) -> None:
    try:
        wait_until_it_answers(url, timeout_s=_START_S, alive=lambda: server.is_running)
    except HeadwaterError as exc:
        raise StreamUnreachable(f"a copy of the run's Redis file can't be served: {exc}; {server.tail()}") from exc
