"""The thread that reads ahead: entries are decoded, looked up and paired while a step computes. Owned by the inbox.

    stream -> delivered before? finished before? -> pairs -> ready, in the order of the stream -> Inbox.take

It writes nothing: what is dropped or acknowledged is the inbox's business, in its own thread. The reader blocks in
`_wait_for_room` while the next step has what it needs, until `next` takes an arrival or `close` is called; and in the
stream, a second at a time. `next` blocks until there is an arrival, the end of the source, an error, or its timeout.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from threading import Condition, Thread

from shared.settings import Settings
from shared.stream import BrokenEntry, StreamEntry
from trainer.connections import Connections
from trainer.preferences import Selection, select_pairs

_CLOSE_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    entry: StreamEntry
    selection: Selection


@dataclass(frozen=True)
class Duplicate:
    """Another entry of a window that is in hand or finished."""

    entry: StreamEntry


@dataclass(frozen=True)
class Ended:
    """The source has ended and every entry of the stream has been given out."""


Arrival = Prepared | Duplicate | BrokenEntry


class Reader:
    def __init__(self, settings: Settings, connections: Connections) -> None:
        self._settings, self._connections = settings, connections
        self._changed = Condition()
        """Guards everything below."""
        self._ready: deque[Arrival] = deque()
        self._in_hand: dict[str, str] = {}
        """Window id -> entry id, from reading until `forget`."""
        self._ended = self._closing = False
        self._error: BaseException | None = None
        self._answered_at = time.monotonic()
        self._thread: Thread | None = None

    @property
    def answered_at(self) -> float:
        """Monotonic seconds of the stream's last answer, an empty one included: it stands still in an outage."""
        return self._answered_at

    def start(self) -> None:
        """Nothing if it was started before."""
        if self._thread is None:
            self._answered_at = time.monotonic()
            self._thread = Thread(target=self._work, name="reader", daemon=True)
            self._thread.start()

    def next(self, timeout_s: float) -> Arrival | Ended | None:
        """None if nothing came within `timeout_s`. Raises what ended the thread, such as StreamError, DatabaseError or
        StreamSchemaError."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended or self._error, max(0.0, timeout_s))
            if self._error is not None:
                raise self._error
            if not self._ready:
                return Ended() if self._ended else None
            arrival = self._ready.popleft()
            self._changed.notify_all()
            return arrival

    def has(self, window_id: str) -> bool:
        with self._changed:
            return window_id in self._in_hand

    def forget(self, window_id: str) -> None:
        """The ledger knows its end, and its entry is acknowledged."""
        with self._changed:
            self._in_hand.pop(window_id, None)

    def close(self) -> None:
        """Stop reading. What was read and not taken stays pending on the stream."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():  # in an outage; the process ends without it
                _log.warning("the reader of the stream does not stop within %g s", _CLOSE_S)

    def _work(self) -> None:
        try:
            while self._wait_for_room():
                delivery = self._connections.deliveries.next()
                if delivery is not None:
                    self._add(self._arrival(delivery))
                elif self._source_has_ended():
                    return self._end()
                self._answered_at = time.monotonic()
        except BaseException as exc:  # noqa: BLE001 (raised by `next`)
            with self._changed:
                self._error = exc
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Until fewer pairs are ready than a step takes. As many entries that give none are the bound on those."""
        wanted = self._settings.trainer.pairs_per_step
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._num_ready() < wanted)
            return not self._closing

    def _num_ready(self) -> int:
        """Pairs; an entry without any counts as one."""
        return sum(max(1, len(one.selection.pairs)) if isinstance(one, Prepared) else 1 for one in self._ready)

    def _arrival(self, delivery: StreamEntry | BrokenEntry) -> Arrival | None:
        """None for an entry that is in hand: it must stay pending."""
        if isinstance(delivery, BrokenEntry):
            return delivery
        window, trainer = delivery.window, self._settings.trainer
        with self._changed:
            held = self._in_hand.get(window.window_id)
        if held == delivery.entry_id:
            return None
        if held is not None or self._connections.ledger.finished_among([window.window_id]):
            return Duplicate(delivery)
        seed = self._settings.run.seed
        selection = select_pairs(window, trainer.objective, min_reward_gap=trainer.min_reward_gap, seed=seed)
        return Prepared(delivery, selection)

    def _add(self, arrival: Arrival | None) -> None:
        if arrival is None:
            return
        with self._changed:
            if isinstance(arrival, Prepared):
                self._in_hand[arrival.entry.window_id] = arrival.entry.entry_id
            self._ready.append(arrival)
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _source_has_ended(self) -> bool:
        """Nothing is written once the source is exhausted, so that is asked first: an empty stream then stays empty."""
        source, connections = self._settings.documents, self._connections
        extent = connections.run.extent(max_epochs=source.max_epochs)
        ended = connections.coordination.source_exhausted(num_parts=source.num_parts, extent=extent)
        return ended and connections.stream.backlog().unread == 0
