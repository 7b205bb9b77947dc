"""Finds ports for the processes of one launcher, so that several runs on one machine do not collide."""

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from shared.errors import HeadwaterError


class Ports:
    """Ports taken by this launcher. Each is held by a file lock until the launcher ends, since a launcher that
    starts at the same moment would otherwise find the same port free before either service has bound it."""

    def __init__(self) -> None:
        self._locks: list[IO[bytes]] = []
        self._folder = Path(tempfile.gettempdir()) / f"headwater-ports-{os.getuid()}"

    def __enter__(self) -> Self:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    def take(self, host: str, wanted: int) -> int:
        """`wanted` if it is free, else (or for 0) one that the system picks."""
        if wanted and self._claim(host, wanted):
            return wanted
        for _ in range(100):
            with socket.socket(_family(host)) as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
            if self._claim(host, port):
                return port
        raise HeadwaterError(f"found no free port on {host} in 100 tries")

    def _claim(self, host: str, port: int) -> bool:
        lock = (self._folder / f"{port}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        if not is_free(host, port):
            lock.close()
            return False
        self._locks.append(lock)
        return True


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind there now."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
