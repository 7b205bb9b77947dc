"""Says in Redis that this replica lives and which weight version it serves. One thread of its own, so that a replica
that is busy loading weights is not taken for dead."""

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
    """`served_version` is None while the replica can't answer: it is then not counted among the living."""

    def __init__(
        self,
        coordination: Coordination,
        replica: str,
        served_version: Callable[[], int | None],
        *,
        lifetime_s: float,
        poll_interval_s: float,
    ) -> None:
        """A heartbeat lives for `lifetime_s`; a third of it, or a new version, brings the next."""
        self._coordination = coordination
        self._replica = replica
        self._served_version = served_version
        self._lifetime_s = lifetime_s
        self._poll_interval_s = min(poll_interval_s, lifetime_s / 3)
        self._stop = threading.Event()
        self._told: tuple[int, float] | None = None
        self._is_heard = True

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
            self._say(self._beat)
        if self._told is not None:
            self._say(lambda: self._coordination.forget_replica(self._replica))

    def _beat(self) -> None:
        version, now = self._served_version(), time.monotonic()
        if version is None:
            return
        if self._told is None or self._told[0] != version or now - self._told[1] >= self._lifetime_s / 3:
            self._coordination.report_replica(self._replica, version, lifetime_s=self._lifetime_s)
            self._told = (version, now)

    def _say(self, words: Callable[[], None]) -> None:
        try:
            words()
        except StreamError as exc:
            if self._is_heard:
                _log.warning("replica %s can't be heard: %s", self._replica, exc)
            self._is_heard = False
        else:
            self._is_heard = True
