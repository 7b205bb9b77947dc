"""The lease on the run: exactly one trainer writes. Taken at the start, renewed from a thread, released at the end.

    acquire the key in Redis  ->  raise the number in the database  ->  raise it in Redis  ->  renew every lease_s / 3
        held by another: wait, until it is free or `stop` is set

A trainer that was frozen past its lease and replaced may believe that it holds it. Its writes carry its number, and the
database, Redis and the stream refuse those under a lower one (FencedError). Files can't compare numbers: there the
number is part of the names, and `confirm` stands before each rename and before each new manifest.

    lease = TrainerLease.take(coordination, ledger, retries, lease_s=30)     # None: asked to stop while waiting
    lease.raise_if_lost()                                                    # at each step
    lease.release()

Called by connections.py.
"""

import logging
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from threading import Event, Thread

from shared.coordination import Coordination
from shared.errors import DatabaseError, FencedError, StreamError
from shared.ledger import Ledger
from shared.records import TRAINER_PART, Lease
from shared.retries import Retries

_POLL_S = 1.0
_SAY_EVERY_S = 60.0
_log = logging.getLogger(__name__)


@dataclass
class TrainerLease:
    """Held from `take` to `release`, or until `lost` is set."""

    lease: Lease
    coordination: Coordination
    ledger: Ledger
    """Under this lease."""
    retries: Retries
    lease_s: float
    lost: Event = field(default_factory=Event, init=False)
    """Another trainer has taken over."""
    _released: Event = field(default_factory=Event, init=False)
    _thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls, coordination: Coordination, ledger: Ledger, retries: Retries, *, lease_s: float
    ) -> "TrainerLease | None":
        """Wait until no other trainer holds the run; None if `retries.stop` is set first. Raises StreamError or
        DatabaseError after `retries` gave up."""
        candidate = _Candidate(coordination, ledger, retries, lease_s)
        said_at = -_SAY_EVERY_S
        while not retries.stop.is_set():
            if (holder := candidate.acquire()) == candidate.owner:
                try:
                    lease = candidate.fence_off_others()
                    _log.info("took the trainer's lease number %d as %s", lease.epoch, lease.owner)
                    return cls(lease, coordination, Ledger(ledger.database, ledger.run_id, lease), retries, lease_s)
                except FencedError as exc:  # it ended meanwhile
                    _log.warning("the trainer's lease is tried again: %s", exc)
            elif holder and time.monotonic() - said_at >= _SAY_EVERY_S:
                said_at = time.monotonic()
                _log.warning("waiting for the trainer %s, which holds the run: it must end, or fall silent", holder)
            retries.stop.wait(min(_POLL_S, lease_s / 3))
        return None

    def raise_if_lost(self) -> None:
        """FencedError if the thread has noticed that another trainer took over."""
        if self.lost.is_set():
            raise FencedError(f"{self._loss}: nothing more was written")

    def confirm(self) -> None:
        """Ask now. FencedError if another trainer has taken over; StreamError or DatabaseError, after `retries` gave
        up, if neither store can say."""
        self.retries(self._confirm_once)

    def release(self) -> None:
        """The next trainer need not wait. If Redis is away, it waits until the lease ends."""
        self._released.set()
        self._thread.join()
        try:
            self.coordination.release_lease(TRAINER_PART, self.lease.owner)
        except StreamError as exc:
            _log.warning("the trainer's lease could not be released, it ends after %g s: %s", self.lease_s, exc)

    @property
    def _loss(self) -> str:
        return f"{self.lease.loss}, or Redis has lost its data"

    def _confirm_once(self) -> None:
        try:
            self.ledger.confirm()
        except DatabaseError:  # a checkpoint must be possible without it; whoever takes over takes the key first
            if not self._renew():
                raise FencedError(self._loss) from None

    def _renew(self) -> bool:
        """Whether it is still held. Raises StreamError."""
        epochs = {TRAINER_PART: self.lease.epoch}
        if self.coordination.renew_leases(epochs, self.lease.owner, lease_s=self.lease_s):
            return True
        self.lost.set()
        return False

    def _keep_renewing(self) -> None:
        """An outage of Redis is waited out: afterwards the lease is renewed unless somebody took it."""
        reached = True
        while not self._released.wait(self.lease_s / 3):
            try:
                if not self._renew():
                    _log.error("%s", self._loss)
                    return
                reached = True
            except StreamError as exc:
                if reached:
                    _log.warning("the trainer's lease can't be renewed, trying again: %s", exc)
                reached = False


@dataclass
class _Candidate:
    """A trainer before it has the lease."""

    coordination: Coordination
    ledger: Ledger
    retries: Retries
    lease_s: float
    owner: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}")

    def acquire(self) -> str | None:
        """Who holds the key in Redis now; it is taken if nobody did. None: it ended between two looks."""

        def attempt() -> str | None:
            self.coordination.acquire_leases([TRAINER_PART], self.owner, room=1, lease_s=self.lease_s)
            return self.coordination.lease_owner(TRAINER_PART)

        return self.retries(attempt)

    def fence_off_others(self) -> Lease:
        """As `Storage.take_part` of the collector, in the same order and for the same reason: a process that is frozen
        anywhere in here wakes without fencing off the next one. FencedError if the key has ended meanwhile."""
        before = self.retries(lambda: self.ledger.lease_epoch(TRAINER_PART))
        ended = FencedError("it ended before it was fenced")
        if self.retries(lambda: self.coordination.lease_owner(TRAINER_PART)) != self.owner:
            raise ended
        epoch = self.retries(lambda: self.ledger.take_part(TRAINER_PART, after=before))
        lease = Lease(TRAINER_PART, self.owner, epoch)
        if not self.retries(lambda: self.coordination.raise_fence(lease)):
            raise ended
        return lease
