"""Reports in Redis that this replica is alive and which weight version it serves. Runs in its own thread, so that a
replica that is busy loading weights does not look dead."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from shared.coordination import Coordination
from shared.errors import StreamError

_log = logging.getLogger(__name__)

_STOP_S = 5.0


@dataclass
class Heartbeat:
    coordination: Coordination
    replica: str
    served_version: Callable[[], int | None]
    """None while the replica can't answer; then nothing is reported."""
    lifetime_s: float
    """A heartbeat expires after this; one is sent every third of it, and at each new version."""
    poll_interval_s: float
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _sent: tuple[int, float] | None = field(default=None, init=False)
    _is_connected: bool = field(default=True, init=False)

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
        while not self._stop.wait(min(self.poll_interval_s, self.lifetime_s / 3)):
            self._try(self._beat)
        if self._sent is not None:
            self._try(lambda: self.coordination.forget_replica(self.replica))

    def _beat(self) -> None:
        version, now = self.served_version(), time.monotonic()
        if version is None:
            return
        if self._sent is None or self._sent[0] != version or now - self._sent[1] >= self.lifetime_s / 3:
            self.coordination.report_replica(self.replica, version, lifetime_s=self.lifetime_s)
            self._sent = (version, now)

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
            self._is_connected = True
        except StreamError as exc:
            if self._is_connected:
                _log.warning("replica %s can't report to Redis: %s", self.replica, exc)
            self._is_connected = False
