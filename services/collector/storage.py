"""Redis and the database from async code: in threads, and patiently. A call that fails for now is made again until
it succeeds, so that nothing is lost while one of them is away. Called by parts.py, leases.py and watch.py.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from services.collector.backoff import Backoff
from services.collector.windows import PolicyTokenizer, Window
from shared import metrics
from shared.coordination import Coordination
from shared.errors import DatabaseError, FencedError, StreamError
from shared.ledger import Ledger, Position, WindowStart
from shared.records import Lease, ScoredWindow, WindowKey
from shared.runs import Run
from shared.seeds import share_of
from shared.stream import WindowStream, encode

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


@dataclass
class Storage:
    """One run's stream, coordination and ledger. What is written under a `lease` raises FencedError once another
    collector has taken the part (shared/records.py)."""

    stream: WindowStream
    coordination: Coordination
    run: Run
    recorder: Recorder
    max_backoff_s: float
    trouble: dict[str, str] = field(default_factory=dict)
    """Per store why its last call failed; absent when it succeeded."""
    _logged_reasons: set[str] = field(default_factory=set)
    # One thread for the database: SQLite has one writer anyway. Redis calls may overlap.
    _database: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "database"))
    _redis: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "redis"))
    # A lease ends while its renewal waits behind other calls.
    _leases: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "leases"))

    @property
    def ledger(self) -> Ledger:
        return self.run.ledger

    async def redis(self, call: Callable[[], T]) -> T:
        """The answer of a blocking Redis call, however long Redis is away."""
        backoff = Backoff(self.max_backoff_s)
        while True:
            try:
                return await self.redis_once(call)
            except StreamError:
                await asyncio.sleep(backoff.next_s())

    async def redis_once(self, call: Callable[[], T]) -> T:
        """One attempt. Raises StreamError."""
        return await self._attempt(self._redis, call)

    async def leases(self, call: Callable[[], T]) -> T:
        """One attempt of a call on leases, which no other call delays. Raises StreamError."""
        return await self._attempt(self._leases, call)

    async def _attempt(self, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(executor, call)
        except StreamError as exc:
            self._note_down("redis", str(exc))
            raise
        self._note_up("redis")
        return answer

    async def database(self, call: Callable[[], T]) -> T:
        """The answer of a blocking database call, however long the database is away. Raises DatabaseRefusalError."""
        backoff = Backoff(self.max_backoff_s)
        while True:
            try:
                answer = await asyncio.get_running_loop().run_in_executor(self._database, call)
            except DatabaseError as exc:
                if not exc.retryable:
                    raise
                self._note_down("database", str(exc))
                await asyncio.sleep(backoff.next_s())
            else:
                self._note_up("database")
                return answer

    async def take_part(self, part: int, owner: str) -> Lease:
        """Fence off everyone who had the part before. `owner` has its key in Redis; FencedError if that has ended.

        The number is read before the key is looked at, and only raised from what was read: a process that is frozen
        anywhere in here wakes without fencing off the next one.
        """
        before = await self.database(lambda: self.ledger.lease_epoch(part))
        ended = FencedError(f"the lease on part {part} ended before the work on it began")
        if await self.redis(lambda: self.coordination.lease_owner(part)) != owner:
            raise ended
        lease = Lease(part, owner, await self.database(lambda: self.ledger.take_part(part, after=before)))
        if not await self.redis(lambda: self.coordination.raise_fence(lease)):
            raise ended
        return lease

    async def begin(self, windows: list[Window], lease: Lease) -> None:
        """The windows of one position are read."""
        starts = [WindowStart(window.key, window.source_id, len(window.token_ids)) for window in windows]
        await self.database(lambda: self.ledger.begin(starts, lease))
        metrics.windows_read_total.inc(len(windows))

    async def write(self, document: ScoredWindow, lease: Lease) -> None:
        """Put the document on the stream, once.

        An attempt that failed may have written it all the same; the next one then finds it there. Only if the trainer
        read and acknowledged it in between is it written twice: the trainer, who knows from the ledger that it is
        trained, drops the repeat.
        """
        body = await asyncio.get_running_loop().run_in_executor(self._redis, encode, document)
        await self.redis(lambda: self.stream.append(document.window_id, body, lease=lease))

    async def finish(self, document: ScoredWindow, lease: Lease) -> None:
        """It is on the stream: note it in the ledger, and keep its candidates for people if it is of their share."""

        def note() -> None:
            self.ledger.mark_scored(
                document.key,
                num_chunks=len(document.chunks),
                num_dropped_chunks=len(document.dropped_chunks),
                weight_version=document.oldest_weight_version,
                lease=lease,
            )
            self.recorder.record(document, lease)

        await self.database(note)
        metrics.windows_scored_total.inc()

    async def drop(self, key: WindowKey, lease: Lease, *, reason: str, detail: str, source_id: str) -> None:
        """It will not be trained."""

        def note() -> bool:
            return self.ledger.drop(key, reason=reason, detail=detail, source_id=source_id, lease=lease)

        if not await self.database(note):
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
        on_stream = await self.redis(self.stream.window_ids)
        await self.database(lambda: self.ledger.mark_found(lease.part, on_stream=on_stream, lease=lease))
        return await self.database(lambda: self.ledger.unfinished(lease.part, on_stream=on_stream))

    async def source_id(self, part: int, position: Position) -> str:
        """Of the document that was read at an unfinished position."""
        return await self.database(lambda: self.ledger.source_id(part, position))

    async def next_position(self, part: int) -> Position:
        return await self.database(lambda: self.ledger.next_position(part))

    def close(self) -> None:
        """Without waiting for calls under way: their waits are bounded by the clients' timeouts."""
        for executor in (self._database, self._redis, self._leases):
            executor.shutdown(wait=False, cancel_futures=True)

    def _note_up(self, store: str) -> None:
        if self.trouble.pop(store, ""):
            _log.info("%s is back", store, extra={"service": store})
        metrics.service_up.labels(store).set(1)

    def _note_down(self, store: str, trouble: str) -> None:
        if store not in self.trouble:
            _log.warning("%s is away, trying again: %s", store, trouble, extra={"service": store})
        self.trouble[store] = trouble
        metrics.service_up.labels(store).set(0)
        metrics.service_retries_total.labels(store).inc()
