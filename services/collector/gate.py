"""Back-pressure: a window starts only while there is room for it.

    RunWatch.look   reads the stream's backlog and the trainer's report from Redis, 5 times a second
    Gate blocks     `enter`, while max_windows_in_flight windows are in work, or in flight + unread >= max_backlog
    Gate unblocks   `leave`, when a window is finished or dropped; `note_backlog`, when the trainer has read

A written window counts as unread at once (`note_written`, before its `leave`), so the sum does not drop between two
looks at the stream.
"""

import asyncio
import contextlib
from dataclasses import dataclass

from services.collector.storage import Storage
from shared import metrics
from shared.coordination import TrainerReport
from shared.errors import StreamError
from shared.settings import Settings
from shared.stream import Backlog

_INTERVAL_S = 0.2


class Gate:
    """One per collector. Several collectors each see the whole stream's unread, but only their own in flight."""

    def __init__(self, *, max_in_flight: int, max_backlog: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_backlog = max_backlog
        self._changed = asyncio.Event()
        self.num_written = 0
        """Remember it before looking at the stream, for `note_backlog`."""
        self.in_flight = 0
        self.unread = 0

    async def enter(self) -> None:
        """Take a place; give it back by `leave`."""
        await self.wait_open()
        self.in_flight += 1  # no await since the check: two waiters can't take the same place
        metrics.windows_in_flight.set(self.in_flight)

    async def wait_open(self) -> None:
        """Until there is a place, without taking it, so that reading does not run ahead."""
        while not self.is_open:
            self._changed.clear()
            await self._changed.wait()

    @property
    def is_open(self) -> bool:
        return self.in_flight < self._max_in_flight and self.in_flight + self.unread < self._max_backlog

    def leave(self) -> None:
        self.in_flight -= 1
        metrics.windows_in_flight.set(self.in_flight)
        self._changed.set()

    def note_written(self) -> None:
        self.num_written += 1
        self.unread += 1

    def note_backlog(self, unread: int, *, written_before: int) -> None:
        """The stream's count. Windows written since that look began are added, so the sum may be a little high until
        the next look, never too low."""
        self.unread = unread + self.num_written - written_before
        self._changed.set()


@dataclass
class RunWatch:
    """Runs beside the work. While Redis is down, the last values stay."""

    storage: Storage
    gate: Gate
    settings: Settings
    extent: str
    step: int
    """That the trainer reported last. It starts from the database, and stays while there is no report: a Redis that
    lost its data has none, and the schedule must not start over."""

    async def run(self) -> None:
        """Until the trainer needs nothing more."""
        while True:
            with contextlib.suppress(StreamError):  # logged by storage; the next look may succeed
                if await self.look():
                    return
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> bool:
        """Whether the trainer needs nothing more. Raises StreamError."""
        written_before = self.gate.num_written
        report, backlog = await self.storage.once(self._read_redis)
        self.gate.note_backlog(backlog.unread, written_before=written_before)
        metrics.stream_unread.set(backlog.unread)
        metrics.stream_pending.set(backlog.pending)
        if report is None:
            return False
        self.step = report.step
        return await self._is_finished(report)

    def _read_redis(self) -> tuple[TrainerReport | None, Backlog]:
        return self.storage.coordination.trainer_report(), self.storage.stream.backlog()

    async def _is_finished(self, report: TrainerReport) -> bool:
        """A run that goes on to more steps finds the report of its earlier end, which must not stop it."""
        if report.state != "finished":
            return False
        if report.step >= self.settings.trainer.steps:
            return True
        exhausted = self.storage.coordination.source_exhausted
        return await self.storage.once(exhausted, num_parts=self.settings.documents.num_parts, extent=self.extent)
