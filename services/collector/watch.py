"""What the collector sees of the run in Redis, a few times a second: weight version, end, unread documents."""

import asyncio
import contextlib

from services.collector.gate import Gate
from services.collector.storage import Storage
from shared import metrics
from shared.coordination import TrainerReport
from shared.errors import StreamError
from shared.stream import Backlog

_INTERVAL_S = 0.2


class RunWatch:
    """Runs beside the work. While Redis is away, what was seen last stays."""

    def __init__(
        self, storage: Storage, gate: Gate, *, num_parts: int, extent: str, steps: int, policy_version: int
    ) -> None:
        self._storage = storage
        self._gate = gate
        self._num_parts = num_parts
        self._extent = extent
        self._steps = steps
        self.policy_version = policy_version
        """The trainer's newest: the newest in the database at first, and never below what was seen last. A Redis that
        lost its data tells of none, and the schedule must not begin again."""
        self.finished = asyncio.Event()
        """The trainer needs nothing more."""

    async def run(self) -> None:
        while not self.finished.is_set():
            with contextlib.suppress(StreamError):  # logged by storage; the next look may succeed
                await self.look()
            await asyncio.sleep(_INTERVAL_S)

    async def look(self) -> None:
        """Raises StreamError."""
        written_before = self._gate.num_written
        backlog, report, announced = await self._storage.redis_once(self._read)
        self._gate.note_backlog(backlog.unread, written_before=written_before)
        metrics.stream_unread.set(backlog.unread)
        metrics.stream_pending.set(backlog.pending)
        self.policy_version = max(self.policy_version, report.policy_version if report else 0, announced or 0)
        if report and await self._is_finished(report):
            self.finished.set()

    def _read(self) -> tuple[Backlog, TrainerReport | None, int | None]:
        coordination = self._storage.coordination
        return self._storage.stream.backlog(), coordination.trainer_report(), coordination.announced_version()

    async def _is_finished(self, report: TrainerReport) -> bool:
        """A run that goes on to more steps finds the report of its earlier end, which must not stop it."""
        if report.state != "finished":
            return False
        return report.step >= self._steps or await self._storage.redis_once(
            lambda: self._storage.coordination.source_exhausted(num_parts=self._num_parts, extent=self._extent)
        )
