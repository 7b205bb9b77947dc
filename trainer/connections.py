"""What the trainer shares with other processes: the stream, the facts in Redis, and the database.

    connections = Connections.open(settings, Retries(give_up_s=900, stop=stop))     # waits until it is the only trainer
    connections.ledger.mark_trained(...)      # blocks while the database is away

Every method waits out an outage (shared/retries.py), so it must be safe to repeat. Every write carries the trainer's
lease (lease.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar, cast

from shared.coordination import Coordination
from shared.errors import StreamError
from shared.ledger import Ledger
from shared.redis import connect
from shared.retries import Retries
from shared.runs import Run
from shared.settings import Settings
from shared.stream import BrokenEntry, StreamEntry, WindowStream
from trainer.lease import TrainerLease

_BLOCK_S = 1.0
_T = TypeVar("_T")


class Deliveries:
    """The stream's entries: first those that were delivered before and never acknowledged, then new ones."""

    def __init__(self, stream: WindowStream) -> None:
        self._stream = stream
        self._pending: Iterator[StreamEntry | BrokenEntry] | None = self._deliver_again()

    def next(self) -> StreamEntry | BrokenEntry | None:
        """None if no entry came within a second. After an error all pending entries are read again, since one may have
        been in the lost answer."""
        try:
            if self._pending is not None:
                if (entry := next(self._pending, None)) is not None:
                    return entry
                self._pending = None
            return next(iter(self._stream.read(count=1, block_s=_BLOCK_S)), None)
        except StreamError:
            self._pending = self._deliver_again()
            raise

    def _deliver_again(self) -> Iterator[StreamEntry | BrokenEntry]:
        self._stream.create()
        yield from self._stream.read_pending()


@dataclass(frozen=True)
class Connections:
    """Methods raise StreamError or DatabaseError only after `retries` gave up, and FencedError once another trainer has
    taken over."""

    lease: TrainerLease
    deliveries: Deliveries
    stream: WindowStream
    """To acknowledge and to count; entries are read from `deliveries`."""
    coordination: Coordination
    run: Run
    ledger: Ledger
    retries: Retries

    @property
    def stop(self) -> Event:
        """Set when the trainer is asked to stop."""
        return self.retries.stop

    @classmethod
    def open(cls, settings: Settings, retries: Retries) -> "Connections | None":
        """Waits for the lease; None if asked to stop before. Then the database is migrated, and the run's row and
        stream exist. `close` releases the lease."""
        run, client = Run.of(settings), connect(settings.redis.url, timeout_s=settings.redis.timeout_s)
        coordination = Coordination(client, settings.run.name)
        retries(lambda: run.open(settings))
        held = TrainerLease.take(coordination, run.ledger, retries, lease_s=settings.trainer.lease_s)
        if held is None:
            return None
        run, stream = run.under(held.lease), WindowStream(client, settings.run.name, lease=held.lease)
        connections = cls(
            lease=held,
            deliveries=retrying(Deliveries(stream), retries),
            stream=retrying(stream, retries),
            coordination=retrying(coordination.under(held.lease), retries),
            run=retrying(run, retries),
            ledger=retrying(run.ledger, retries),
            retries=retries,
        )
        try:
            connections.stream.create()
        except BaseException:
            connections.close()
            raise
        return connections

    def close(self) -> None:
        self.lease.release()


def retrying(store: _T, retries: Retries) -> _T:
    """`store`, each of whose methods is retried."""
    return cast(_T, _Retrying(store, retries))


@dataclass(frozen=True)
class _Retrying:
    _store: object
    _retries: Retries

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found
        return lambda *arguments, **options: self._retries(lambda: found(*arguments, **options))
