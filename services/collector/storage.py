"""Redis and the database from async code: in threads, and retried until they answer, so that an outage loses nothing.

Called by parts.py, leases.py and gate.py.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from services.collector.windows import PolicyTokenizer, Window
from shared import metrics
from shared.coordination import Coordination
from shared.errors import DatabaseError, FencedError, StreamError
from shared.ledger import Position, WindowStart
from shared.records import Lease, ScoredWindow, WindowKey
from shared.retries import Retries
from shared.runs import Run, ShownText
from shared.seeds import share_of
from shared.stream import WindowStream, encode

_log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

BASE_VERSION = 0
"""The weight version that the run's policy began with."""
_PREFIX_CHARACTERS = 500
_PREFIX_TOKENS = 500  # enough for the characters: most tokens have several


class Storage:
    """One run's stream, leases and ledger. What is written under a `lease` raises FencedError once another collector
    has taken the part (shared/records.py).

        position = await storage.in_database(storage.ledger.next_position, part)     # waits out an outage
        is_ended = await storage.once(storage.coordination.source_exhausted, ...)    # one attempt: StreamError
    """

    def __init__(
        self,
        stream: WindowStream,
        coordination: Coordination,
        run: Run,
        tokenizer: PolicyTokenizer,
        *,
        record_share: float,
        max_backoff_s: float,
        base_windows_to_keep: int = 0,
    ) -> None:
        self.stream = stream
        self.coordination = coordination
        self.run = run
        self.ledger = run.ledger
        self._tokenizer = tokenizer
        self._record_share = record_share
        self.base_windows_to_keep = base_windows_to_keep
        """With rollouts of the base policy, recorded whatever `record_share` says (probes.py)."""
        self._retries = Retries(max_wait_s=max_backoff_s, on_failure=lambda *_: None)
        self.trouble: dict[str, str] = {}
        """Per store why its last call failed; absent when it succeeded."""
        self._logged_reasons: set[str] = set()
        # One thread for the database: SQLite has one writer anyway. Redis calls may overlap.
        self._database_thread = ThreadPoolExecutor(1, "database")
        self._redis_threads = ThreadPoolExecutor(4, "redis")
        # Its own thread: a lease would end while its renewal waits behind other calls.
        self._lease_thread = ThreadPoolExecutor(1, "leases")

    async def in_redis(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a blocking Redis call, however long Redis is down."""
        return await self._retries.wait_for(lambda: self.once(call, *args, **kwargs))

    async def in_database(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a blocking database call, however long the database is down. Raises DatabaseRefusalError."""
        bound = partial(call, *args, **kwargs)
        return await self._retries.wait_for(lambda: self._attempt("database", self._database_thread, bound))

    async def once(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One attempt at a blocking Redis call. Raises StreamError."""
        return await self._attempt("redis", self._redis_threads, partial(call, *args, **kwargs))

    async def once_for_leases(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same in the thread of the leases."""
        return await self._attempt("redis", self._lease_thread, partial(call, *args, **kwargs))

    async def take_part(self, part: int, owner: str) -> Lease:
        """Fence off everyone who had the part before. `owner` has its key in Redis; FencedError if that has ended.

        The number is read before the key is looked at, and only raised from what was read: a process that is frozen
        anywhere in here wakes without fencing off the next one.
        """
        before = await self.in_database(self.ledger.lease_epoch, part)
        ended = FencedError(f"the lease on part {part} ended before the work on it began")
        if await self.in_redis(self.coordination.lease_owner, part) != owner:
            raise ended
        lease = Lease(part, owner, await self.in_database(self.ledger.take_part, part, after=before))
        if not await self.in_redis(self.coordination.raise_fence, lease):
            raise ended
        return lease

    async def begin(self, windows: list[Window], lease: Lease) -> None:
        """Enter the windows of one position in the ledger."""
        starts = [WindowStart(window.key, window.source_id, len(window.token_ids)) for window in windows]
        await self.in_database(self.ledger.begin, starts, lease)
        metrics.windows_read_total.inc(len(windows))

    async def write(self, window: ScoredWindow, lease: Lease) -> None:
        """Put the window on the stream, once.

        A failed attempt may have written it all the same; the next attempt then finds it. It is written twice only if
        the trainer has acknowledged it in between, and then the trainer drops the repeat: the ledger says `trained`.
        """
        body = await asyncio.get_running_loop().run_in_executor(self._redis_threads, encode, window)
        await self.in_redis(self.stream.append, window.window_id, body, lease=lease)

    async def finish(self, window: ScoredWindow, lease: Lease, *, shown: ShownText) -> None:
        """Mark a window that is on the stream in the ledger, and record its candidates if it is drawn for that."""

        def note() -> None:
            self.ledger.mark_scored(
                window.key,
                num_chunks=len(window.chunks),
                num_dropped_chunks=len(window.dropped_chunks),
                weight_version=window.oldest_weight_version,
                lease=lease,
            )
            self.record(window, lease, shown=shown)

        await self.in_database(note)
        metrics.windows_scored_total.inc()

    def record(self, window: ScoredWindow, lease: Lease, *, shown: ShownText | None = None) -> None:
        """Keep the candidates, for a share of all windows drawn by window id, and the first ones with rollouts of the
        base policy. Blocking."""
        if share_of(window.key, "record") < self._record_share or self._keeps_for_probes(window):
            prefixes = [self._end_of_prefix(window.token_ids, chunk.start) for chunk in window.chunks]
            self.run.record_chunks(window, prefixes, lease, shown=shown)

    def _keeps_for_probes(self, window: ScoredWindow) -> bool:
        if window.oldest_weight_version != BASE_VERSION or self.base_windows_to_keep <= 0:
            return False
        self.base_windows_to_keep -= 1
        return True

    def _end_of_prefix(self, token_ids: Sequence[int], start: int) -> str:
        return self._tokenizer.decode(token_ids[max(0, start - _PREFIX_TOKENS) : start])[-_PREFIX_CHARACTERS:]

    async def drop(self, key: WindowKey, lease: Lease, *, reason: str, detail: str, source_id: str) -> None:
        if not await self.in_database(
            self.ledger.drop, key, reason=reason, detail=detail, source_id=source_id, lease=lease
        ):
            _log.warning("%s was not dropped (%s): it is trained already", key, reason)
            return
        metrics.windows_dropped_total.labels(reason).inc()
        # The ledger has every one; the log shows the first of each reason, since a bad file may hold millions.
        level = logging.DEBUG if reason in self._logged_reasons else logging.WARNING
        self._logged_reasons.add(reason)
        _log.log(level, "dropped %s: %s", key, detail, extra={"window_id": str(key), "reason": reason})

    async def left_over(self, lease: Lease) -> dict[Position, set[int]]:
        """Windows of the part that an earlier collector read and did not finish.

        The stream's ids are read BEFORE the ledger. The trainer marks a window `trained` before it acknowledges, that
        is deletes, its entry. So a window that is missing among the ids because it was acknowledged is `trained` in
        the ledger that is read afterwards, and not done again. (The other way round, an entry acknowledged between the
        two looks would still be `scored` in the first and gone in the second.) Nobody adds entries or rows of this
        part in between: everyone who had it before is fenced off.
        """
        on_stream = await self.in_redis(self.stream.window_ids)
        await self.in_database(self.ledger.mark_found, lease.part, on_stream=on_stream, lease=lease)
        return await self.in_database(self.ledger.unfinished, lease.part, on_stream=on_stream)

    def close(self) -> None:
        """Does not wait for calls under way: the clients' timeouts bound them."""
        for executor in (self._database_thread, self._redis_threads, self._lease_thread):
            executor.shutdown(wait=False, cancel_futures=True)

    async def _attempt(self, store: str, executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        try:
            answer = await asyncio.get_running_loop().run_in_executor(executor, call)
        except (StreamError, DatabaseError) as exc:
            if exc.retryable:
                self._note_down(store, str(exc))
            raise
        if self.trouble.pop(store, ""):
            _log.info("%s is back", store, extra={"service": store})
        metrics.service_up.labels(store).set(1)
        return answer

    def _note_down(self, store: str, trouble: str) -> None:
        if store not in self.trouble:
            _log.warning("%s is down, retrying: %s", store, trouble, extra={"service": store})
        self.trouble[store] = trouble
        metrics.service_up.labels(store).set(0)
        metrics.service_retries_total.labels(store).inc()
