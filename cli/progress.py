"""Reads how far a run is: step rows and documents from the database, the backlog from Redis, rates from the collector.

Called by cli/run.py about once a second. A part that does not answer is absent from the snapshot (None), never zero.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import redis
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from shared.database import StepRow, transaction
from shared.errors import DatabaseError, StreamError
from shared.http import authorization_header
from shared.ledger import Balance, Ledger
from shared.stream import Backlog, WindowStream

_RATE_WINDOW_S = 120.0


@dataclass(frozen=True)
class Snapshot:
    """One look at a run."""

    step: int
    steps: int
    figures: dict[str, float] = field(default_factory=dict)
    """Of the newest step, by the names of trainer/figures.py."""
    balance: Balance | None = None
    backlog: Backlog | None = None
    steps_per_minute: float | None = None
    candidates_per_second: float | None = None

    @property
    def seconds_left(self) -> float | None:
        if not self.steps_per_minute:
            return None
        return (self.steps - self.step) / self.steps_per_minute * 60


class Rate:
    """How fast a number that only ascends has been ascending lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, window_s: float = _RATE_WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._seen: deque[tuple[float, float]] = deque()

    def observe(self, value: float) -> None:
        """A number below the last one (a process began anew) starts the measurement again."""
        now = self._clock()
        if self._seen and value < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, value))
        while len(self._seen) > 2 and self._seen[0][0] < now - self._window_s:
            self._seen.popleft()

    @property
    def per_second(self) -> float | None:
        """None until two looks saw a difference."""
        if len(self._seen) < 2 or self._seen[-1][1] == self._seen[0][1]:
            return None
        (began, first), (ended, last) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - began) if ended > began else None


class ProgressReader:
    """Looks at one run's database, Redis and collector."""

    def __init__(
        self, engine: Engine, run_id: str, *, steps: int, client: redis.Redis, collector_url: str, token: str
    ) -> None:
        self._engine = engine
        self._ledger = Ledger(engine, run_id)
        self._run_id = run_id
        self._steps = steps
        self._stream = WindowStream(client, run_id)
        self._metrics_url = f"{collector_url}/metrics"
        self._headers = authorization_header(token)
        self._step_rate, self._candidate_rate = Rate(), Rate()

    def look(self) -> Snapshot:
        step, figures = self._newest_step()
        self._step_rate.observe(step)
        candidates = self._candidates()
        if candidates is not None:
            self._candidate_rate.observe(candidates)
        per_second = self._step_rate.per_second
        return Snapshot(
            step=step,
            steps=self._steps,
            figures=figures,
            balance=self._balance(),
            backlog=self._backlog(),
            steps_per_minute=per_second * 60 if per_second else None,
            candidates_per_second=self._candidate_rate.per_second,
        )

    def _newest_step(self) -> tuple[int, dict[str, float]]:
        query = sa.select(StepRow).where(StepRow.run_id == self._run_id).order_by(StepRow.step.desc()).limit(1)
        with transaction(self._engine) as session:
            row = session.scalar(query)
            return (row.step, dict(row.figures)) if row else (0, {})

    def _balance(self) -> Balance | None:
        try:
            return self._ledger.balance()
        except DatabaseError:  # locked for longer than its timeout; the next look tries again
            return None

    def _backlog(self) -> Backlog | None:
        try:
            return self._stream.backlog()
        except StreamError:
            return None

    def _candidates(self) -> float | None:
        """Candidates that the collector has gathered since it started."""
        try:
            answer = httpx.get(self._metrics_url, headers=self._headers, timeout=2.0)
        except httpx.HTTPError:
            return None
        return sum_of_metric(answer.text, "headwater_candidates_total") if answer.is_success else None


def sum_of_metric(text: str, name: str) -> float:
    """Sum over all labels of one metric in Prometheus text."""
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return float(sum(sample.value for sample in samples if sample.name == name))
