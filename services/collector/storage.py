"""Redis and the database from async code: in threads, and retried until they answer, so that an outage loses nothing.

Called by parts.py, leases.py and gate.py.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from services.collector.backoff import Backoff
from services.collector.windows import PolicyTokenizer, Window
from shared import metrics
from shared.coordination import Coordination, TrainerReport
from shared.errors import DatabaseError, FencedError, StreamError
from shared.identity import Manifest
from shared.ledger import Balance, Position, WindowStart
from shared.records import Lease, ScoredWindow, WindowKey
from shared.runs import Run
from shared.seeds import share_of
from shared.settings import Settings
from shared.stream import Backlog, WindowStream, encode

_PREFIX_CHARACTERS = 500
_PREFIX_TOKENS = 500
"""Enough for the characters above: a token has at least one byte, and most have several characters."""


@dataclass(frozen=True)
class Recorder:
    """Records a share of all windows for people to read, drawn by window id. Blocking."""

    run: Run
    tokenizer: PolicyTokenizer
    share: float

    def record(self, window: ScoredWindow, lease: Lease) -> None:
        """Raises FencedError as the ledger does."""
        if share_of(window.key, "record") >= self.share:
            return
        prefixes = [self._end_of_prefix(window.token_ids, chunk.start) for chunk in window.chunks]
        self.run.record_chunks(window, prefixes, lease)

    def _end_of_prefix(self, token_ids: Sequence[int], start: int) -> str:
        return self.tokenizer.decode(token_ids[max(0, start - _PREFIX_TOKENS) : start])[-_PREFIX_CHARACTERS:]


_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Sight:
    """What one look at Redis showed."""

    backlog: Backlog
    trainer: TrainerReport | None
    weight_version: int
    """The newest that was announced or reported; 0 if Redis knows none."""


class Storage:
    """One run's stream, leases and ledger. What is written under a `lease` raises FencedError once another collector
    has taken the part (shared/records.py)."""

    def __init__(
        self,
        stream: WindowStream,
        coordination: Coordination,
        run: Run,
        recorder: Recorder,
        *,
        max_backoff_s: float,
    ) -> None:
        self._stream = stream
        self._coordination = coordination
        self._run = run
        self._ledger = run.ledger
        self._recorder = recorder
        self._max_backoff_s = max_backoff_s
        self.trouble: dict[str, str] = {}
        """Per store why its last call failed; absent when it succeeded."""
        self._logged_reasons: set[str] = set()
        # One thread for the database: SQLite has one writer anyway. Redis calls may overlap.
        self._database_thread = ThreadPoolExecutor(1, "database")
        self._redis_threads = ThreadPoolExecutor(4, "redis")
        # Its own thread: a lease would end while its renewal waits behind other calls.
        self._lease_thread = ThreadPoolExecutor(1, "leases")

    async def open_run(self, settings: Settings) -> None:
        """Schema, run and stream are there; SettingsError if the run began with other settings."""
        await self._database(lambda: self._run.open(settings))
        await self._redis(self._stream.create)

    async def adopt_source(self, manifest: Manifest, *, max_epochs: int) -> str:
        """The extent of this start (Run.extent). SourceError if the run began with other documents."""
        await self._database(lambda: self._run.adopt_source(manifest))
        return await self._database(lambda: self._run.extent(max_epochs=max_epochs))

    async def newest_weight_version(self) -> int:
        return await self._database(self._run.newest_weight_version) or 0

    async def look(self) -> Sight:
        """One attempt. Raises StreamError."""

        def read() -> Sight:
            report, announced = self._coordination.trainer_report(), self._coordination.announced_version()
            reported = report.weight_version if report else 0
            return Sight(self._stream.backlog(), report, max(reported, announced or 0))

        return await self._attempt(self._redis_threads, read)

    async def source_exhausted(self, *, num_parts: int, extent: str) -> bool:
        """One attempt. Raises StreamError."""
        return await self._attempt(
            self._redis_threads, lambda: self._coordination.source_exhausted(num_parts=num_parts, extent=extent)
        )

    async def acquire_leases(self, parts: Sequence[int], owner: str, *, room: int, lease_s: float) -> list[int]:
        """See Coordination; one attempt, as of the two that follow. Raises StreamError."""
        return await self._attempt(
            self._lease_thread,
            lambda: self._coordination.acquire_leases(parts, owner, room=room, lease_s=lease_s),
        )

    async def renew_leases(self, epochs: Mapping[int, int | None], owner: str, *, lease_s: float) -> set[int]:
        return await self._attempt(
            self._lease_thread, lambda: self._coordination.renew_leases(epochs, owner, lease_s=lease_s)
        )

    async def release_leases(self, parts: Sequence[int], owner: str) -> None:
        def release() -> None:
            for part in parts:
                self._coordination.release_lease(part, owner)

        await self._attempt(self._lease_thread, release)

    async def take_part(self, part: int, owner: str) -> Lease:
        """Fence off everyone who had the part before. `owner` has its key in Redis; FencedError if that has ended.

        The number is read before the key is looked at, and only raised from what was read: a process that is frozen
        anywhere in here wakes without fencing off the next one.
        """
        before = await self._database(lambda: self._ledger.lease_epoch(part))
        ended = FencedError(f"the lease on part {part} ended before the work on it began")
        if await self._redis(lambda: self._coordination.lease_owner(part)) != owner:
            raise ended
        lease = Lease(part, owner, await self._database(lambda: self._ledger.take_part(part, after=before)))
        if not await self._redis(lambda: self._coordination.raise_fence(lease)):
            raise ended
        return lease

    async def begin(self, windows: list[Window], lease: Lease) -> None:
        """The windows of one position are read."""
        starts = [WindowStart(window.key, window.source_id, len(window.token_ids)) for window in windows]
        await self._database(lambda: self._ledger.begin(starts, lease))
        metrics.windows_read_total.inc(len(windows))

    async def write(self, window: ScoredWindow, lease: Lease) -> None:
        """Put the window on the stream, once.

        A failed attempt may have written it all the same; the next attempt then finds it. It is written twice only if
        the trainer has acknowledged it in between, and then the trainer drops the repeat: the ledger says `trained`.
        """
        body = await asyncio.get_running_loop().run_in_executor(self._redis_threads, encode, window)
        await self._redis(lambda: self._stream.append(window.window_id, body, lease=lease))

    async def finish(self, window: ScoredWindow, lease: Lease) -> None:
        """It is on the stream: mark it in the ledger, and record its candidates if it is drawn for that."""

        def note() -> None:
            self._ledger.mark_scored(
                window.key,
                num_chunks=len(window.chunks),
                num_dropped_chunks=len(window.dropped_chunks),
                weight_version=window.oldest_weight_version,
                lease=lease,
            )
            self._recorder.record(window, lease)

        await self._database(note)
        metrics.windows_scored_total.inc()

    async def drop(self, key: WindowKey, lease: Lease, *, reason: str, detail: str, source_id: str) -> None:
        """It will not be trained."""

        def note() -> bool:
            return self._ledger.drop(key, reason=reason, detail=detail, source_id=source_id, lease=lease)

        if not await self._database(note):
            _log.warning("%s was not dropped (%s): it is trained already", key, reason)
            return
        metrics.windows_dropped_total.labels(reason).inc()
        # The ledger has every one; the log shows the first of each reason, since a bad file may hold millions.
        level = logging.DEBUG if reason in self._logged_reasons else logging.WARNING
        self._logged_reasons.add(reason)
        _log.log(level, "dropped %s: %s", key, detail, extra={"window_id": str(key), "reason": reason})

    async def left_over(self, lease: Lease) -> dict[Position, set[int]]:
        """Windows of the part that an earlier collector read and did not finish.

        The stream's ids are read BEFORE the ledger. The trainer marks a document `trained` before it acknowledges,
        that is deletes, its entry. So a window that is missing among the ids because it was acknowledged is `trained`
        in the ledger that is read afterwards, and not done again. (The other way round, an entry acknowledged between
        the two looks would still be `scored` in the first and gone in the second.) Nobody adds entries or rows of this
        part in between: everyone who had it before is fenced off.
        """
        on_stream = await self._redis(self._stream.window_ids)
        await self._database(lambda: self._ledger.mark_found(lease.part, on_stream=on_stream, lease=lease))
        return await self._database(lambda: self._ledger.unfinished(lease.part, on_stream=on_stream))

    async def source_id(self, part: int, position: Position) -> str:
        """Of the document that was read at an unfinished position."""
        return await self._database(lambda: self._ledger.source_id(part, position))

    async def next_position(self, part: int) -> Position:
        return await self._database(lambda: self._ledger.next_position(part))

    async def balance(self) -> Balance:
        return await self._database(self._ledger.balance)

    async def exhausted_parts(self, *, extent: str) -> set[int]:
        return await self._redis(lambda: self._coordination.exhausted_parts(extent=extent))

    async def mark_exhausted(self, lease: Lease, *, extent: str) -> None:
        await self._redis(lambda: self._coordination.mark_exhausted(lease, extent=extent))

    async def record_event(self, kind: str, message: str, **data: Any) -> None:
        await self._database(lambda: self._run.record_event("collector", kind, message, **data))

    def close(self) -> None:
        """Does not wait for calls under way: the clients' timeouts bound them."""
        for executor in (self._database_thread, self._redis_threads, self._lease_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    async def _redis(self, call: Callable[[], T]) -> T:
        """The answer of a blocking Redis call, however long Redis is down."""
        backoff = Backoff(self._max_backoff_s)
        while True:
            try:
                return await self._attempt(self._redis_threads, call)
            except StreamError:
                await asyncio.sleep(backoff.next_s())

    async def _database(self, call: Callable[[], T]) -> T:
        """The answer of a blocking database call, however long the database is down. Raises DatabaseRefusalError."""
        backoff = Backoff(self._max_backoff_s)
        while True:
            try:
                answer = await asyncio.get_running_loop().run_in_executor(self._database_thread, call)
            except DatabaseError as exc:
                if not exc.retryable:
                    raise
                self._note_down("database", str(exc))
                await asyncio.sleep(backoff.next_s())
            else:
                self._note_up("database")
                return answer

    async def _attempt(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(executor, call)
        except StreamError as exc:
            self._note_down("redis", str(exc))
            raise
        self._note_up("redis")
        return answer

    def _note_up(self, store: str) -> None:
        if self.trouble.pop(store, ""):
            _log.info("%s is back", store, extra={"service": store})
        metrics.service_up.labels(store).set(1)

    def _note_down(self, store: str, trouble: str) -> None:
        if store not in self.trouble:
            _log.warning("%s is down, retrying: %s", store, trouble, extra={"service": store})
        self.trouble[store] = trouble
        metrics.service_up.labels(store).set(0)
        metrics.service_retries_total.labels(store).inc()
