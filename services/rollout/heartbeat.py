"""Reports in Redis that this replica is alive and which weight version it serves. Runs in its own thread, so that a
replica that is busy loading weights does not look dead."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable

from shared.coordination import Coordination
from shared.errors import StreamError

_log = logging.getLogger(__name__)

_STOP_S = 5.0


class Heartbeat:
    """`served_version` is None while the replica can't answer; then nothing is reported."""

    def __init__(
        self,
        coordination: Coordination,
        replica: str,
        served_version: Callable[[], int | None],
        *,
        lifetime_s: float,
        poll_interval_s: float,
    ) -> None:
        """A heartbeat expires after `lifetime_s`; one is sent every third of that, and at each new version."""
        self._coordination = coordination
        self._replica = replica
        self._served_version = served_version
        self._lifetime_s = lifetime_s
        self._poll_interval_s = min(poll_interval_s, lifetime_s / 3)
        self._stop = threading.Event()
        self._sent: tuple[int, float] | None = None
        self._is_connected = True

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.join, _STOP_S)

    def _run(self) -> None:
        while not self._stop.wait(self._poll_interval_s):
            self._try(self._beat)
        if self._sent is not None:
            self._try(lambda: self._coordination.forget_replica(self._replica))

    def _beat(self) -> None:
        version, now = self._served_version(), time.monotonic()
        if version is None:
            return
        if self._sent is None or self._sent[0] != version or now - self._sent[1] >= self._lifetime_s / 3:
            self._coordination.report_replica(self._replica, version, lifetime_s=self._lifetime_s)
            self._sent = (version, now)

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except StreamError as exc:
            if self._is_connected:
                _log.warning("replica %s can't report to Redis: %s", self._replica, exc)
            self._is_connected = False
        else:
            self._is_connected = True
