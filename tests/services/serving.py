"""Runs an app on a real server of this process, for tests that need sockets."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI


@contextmanager
def running(app: FastAPI, *, wait_ready: bool = True) -> Iterator[str]:
    """The base URL of `app` on a free port, with its lifespan; stopped at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        try:
            if wait_ready:
                wait_until(lambda: is_ready(url), what=f"{url} to be ready")
            yield url
        finally:
            server.should_exit = True
            thread.join(20)


def wait_until(condition: object, *, what: str, timeout_s: float = 30.0) -> None:
    """Poll a callable until it is true; AssertionError after `timeout_s`."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
