"""Which replica of a service gets a request. Called by clients.py.

    own   the first in the document's hash order, so that a request that is asked again, or a second one about a window,
          meets warm caches: the keys and values that vLLM keeps of a prefix, the verdicts that a judge remembers
          (rendezvous hashing: a replica that comes or goes moves only its own documents)
    load  the next in that order, where the first has far more in work than the mean (consistent hashing with bounded
          loads, arXiv 1608.01350)
    away  the next one, where the first does not answer

A replica that failed is left alone for a second, or for as long as it asked. Then one request tries it, while all
others go on elsewhere; once that is answered it is back. With a single address none of this happens: it is always
asked.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

from shared import metrics
from shared.metrics import EngineRole
from shared.secret_urls import without_secrets

MAX_LOAD = 1.5
"""Requests of one replica over the mean of those that answer. At 2, one of two replicas might have them all."""
ALWAYS_TAKEN = 2
"""Requests that a replica may have however few there are elsewhere."""
REST_S = 1.0
"""How long a replica that failed is left alone, at least."""

Choice = Literal["own", "load", "away"]


@dataclass(eq=False)
class Replica:
    url: str
    num_now: int = 0
    """Requests that it has not answered yet."""
    trouble: str = ""
    """Why its last request failed; empty while it answers."""
    rests_until: float = 0.0
    """On the clock of `Replicas`."""
    is_tried: bool = False
    """A request has been sent to find out whether it is back."""

    @property
    def name(self) -> str:
        """For people and metrics: the address without scheme and secrets."""
        return without_secrets(self.url).partition("://")[2]


@dataclass
class Replicas:
    """Of one service. Not for threads: the collector's event loop owns it."""

    role: EngineRole
    base_urls: Sequence[str]
    clock: Callable[[], float] = time.monotonic
    all: tuple[Replica, ...] = field(init=False)

    def __post_init__(self) -> None:
        urls = dict.fromkeys(url.rstrip("/") for url in self.base_urls)
        self.all = tuple(map(Replica, urls))
        for replica in self.all:
            metrics.replica_up.labels(self.role, replica.name).set(1)

    @property
    def away(self) -> list[Replica]:
        return [replica for replica in self.all if replica.trouble]

    @contextmanager
    def place(self, document: str, *, after: Collection[Replica] = ()) -> Iterator[Replica | None]:
        """The replica for a request about `document`, or None if all are away and none may be tried yet. Those in
        `after` have failed the same request and come last."""
        found = self._choose(document, after)
        if found is None:
            yield None
            return
        replica, choice = found
        tries = bool(replica.trouble)
        replica.is_tried |= tries
        self._count(replica, 1)
        metrics.replica_requests_total.labels(self.role, replica.name, choice).inc()
        try:
            yield replica
        finally:
            replica.is_tried &= not tries
            self._count(replica, -1)

    def note_answer(self, replica: Replica) -> None:
        replica.trouble = ""
        metrics.replica_up.labels(self.role, replica.name).set(1)

    def note_failure(self, replica: Replica, trouble: str, *, rest_s: float = 0.0) -> None:
        replica.trouble = trouble
        replica.rests_until = self.clock() + max(REST_S, rest_s)
        metrics.replica_up.labels(self.role, replica.name).set(0)

    def _choose(self, document: str, after: Collection[Replica]) -> tuple[Replica, Choice] | None:
        ordered = sorted(self.all, key=lambda replica: _weight(replica, document))
        if len(ordered) == 1:
            return ordered[0], "own"
        own, bound = ordered[0], self._most_at_once()
        for replica in sorted(ordered, key=lambda replica: replica in after):
            if self._may_be_tried(replica) if replica.trouble else replica.num_now < bound:
                if replica is own:
                    return replica, "own"
                return replica, "away" if own.trouble or own in after else "load"
        return None

    def _most_at_once(self) -> int:
        """Requests that a replica may have, the new one included. At least one of those that answer has fewer."""
        up = [replica for replica in self.all if not replica.trouble]
        mean = (sum(replica.num_now for replica in up) + 1) / max(1, len(up))
        return max(ALWAYS_TAKEN, math.ceil(MAX_LOAD * mean))

    def _may_be_tried(self, replica: Replica) -> bool:
        return not replica.is_tried and self.clock() >= replica.rests_until

    def _count(self, replica: Replica, change: int) -> None:
        replica.num_now += change
        metrics.replica_requests_in_flight.labels(self.role, replica.name).set(replica.num_now)


def _weight(replica: Replica, document: str) -> bytes:
    return blake2b(f"{replica.url} {document}".encode(), digest_size=8).digest()
