"""The bounded queue between the event loop and the thread that owns a model, and the jobs in it.

The event loop puts jobs and never blocks: a full queue raises OverloadedError. The model's thread blocks in `take`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from services.engine.base import Generation, Sampling, Tokens, TokenScore
from shared import metrics
from shared.errors import EngineError, OverloadedError

T = TypeVar("T")


@dataclass(frozen=True, eq=False, kw_only=True)
class Job(Generic[T]):
    future: "Future[T]" = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)

    def finish(self, result: T) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Pass the error to the caller, unless it has cancelled or has its answer."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(frozen=True, eq=False)
class GenerateJob(Job[list[list[Generation]]]):
    prompts: Sequence[Tokens]
    sampling: Sampling
    watched: Tokens = ()
    """Tokens with which a word of `sampling.words` may begin."""

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * self.sampling.num_samples

    @property
    def row_tokens(self) -> int:
        return max(map(len, self.prompts)) + self.sampling.max_tokens


@dataclass(frozen=True, eq=False)
class ScoreJob(Job[tuple[list[list[TokenScore]], int]]):
    prompt: Tokens
    continuations: Sequence[Tokens]

    @property
    def num_rows(self) -> int:
        """Continuations of one token need no row: the prompt's forward pass scores them."""
        return max(1, sum(len(continuation) > 1 for continuation in self.continuations))

    @property
    def row_tokens(self) -> int:
        return len(self.prompt) + max(map(len, self.continuations))


@dataclass(frozen=True, eq=False)
class LoadJob(Job[None]):
    write: Callable[[Any], None]
    """Puts checked weights into the model's module, on the thread that owns it."""
    version: int
    base: int | None = None
    """The version that must be loaded; None if `write` replaces all weights."""


Batch = list[GenerateJob] | list[ScoreJob] | LoadJob


class JobQueue:
    """FIFO, except that a batch may pull forward later jobs of the same kind."""

    def __init__(self, *, max_queued: int, max_batch_tokens: int, batch_wait_s: float) -> None:
        self._max_queued = max_queued
        self._max_batch_tokens = max_batch_tokens
        self._batch_wait_s = batch_wait_s
        self._waiting: deque[GenerateJob | ScoreJob] = deque()
        self._loads: deque[LoadJob] = deque()
        self._closed = ""
        self._changed = threading.Condition()

    def put(self, job: Job[Any]) -> None:
        """Raises OverloadedError when full, EngineError when closed."""
        with self._changed:
            if self._closed:
                raise EngineError(self._closed)
            if isinstance(job, LoadJob):
                self._loads.append(job)
            elif len(self._waiting) >= self._max_queued:
                found = f"{len(self._waiting)} requests wait for the engine"
                raise OverloadedError(f"{found}, engine.max_queued_requests allows no more")
            elif isinstance(job, GenerateJob | ScoreJob):
                self._waiting.append(job)
            metrics.engine_queued_requests.set(len(self._waiting))
            self._changed.notify()
        job.future.add_done_callback(self._drop_cancelled)

    def take(self) -> Batch | None:
        """The next batch; weight updates go first. None once closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._loads or self._waiting)
                self._wait_for_more()
                if self._closed:
                    return None
                if self._loads:
                    return self._loads.popleft()
                batch = self._take_fitting()
                metrics.engine_queued_requests.set(len(self._waiting))
                if batch:
                    return batch

    def close(self, reason: str) -> None:
        """Refuse new jobs and fail the waiting ones."""
        with self._changed:
            self._closed = self._closed or reason
            left: list[Job[Any]] = [*self._waiting, *self._loads]
            self._waiting.clear()
            self._loads.clear()
            self._changed.notify_all()
        for job in left:
            job.fail(EngineError(reason))

    def _drop_cancelled(self, ended: "Future[Any]") -> None:
        """Whoever asked has gone: the place in the queue is free."""
        if ended.cancelled():
            with self._changed:
                self._waiting = deque(job for job in self._waiting if job.future is not ended)
                metrics.engine_queued_requests.set(len(self._waiting))

    def _wait_for_more(self) -> None:
        if self._waiting:
            left_s = self._waiting[0].queued_at + self._batch_wait_s - time.monotonic()
            self._changed.wait_for(lambda: self._closed or self._loads or self._is_full(), timeout=max(0.0, left_s))

    def _is_full(self) -> bool:
        if not self._waiting:  # those it waited with were cancelled
            return False
        return sum(job.num_rows for job in self._waiting) * self._waiting[0].row_tokens >= self._max_batch_tokens

    def _take_fitting(self) -> list[GenerateJob] | list[ScoreJob]:
        """The oldest job and all later ones of its kind that fit; drops cancelled jobs."""
        taken: list[Any] = []
        rest: deque[GenerateJob | ScoreJob] = deque()
        num_rows = row_tokens = 0
        full = False
        for job in self._waiting:
            if job.future.cancelled():
                continue
            fits = (num_rows + job.num_rows) * max(row_tokens, job.row_tokens) <= self._max_batch_tokens
            same_kind = not taken or type(taken[0]) is type(job)
            if same_kind and not full and (fits or not taken):
                taken.append(job)
                num_rows, row_tokens = num_rows + job.num_rows, max(row_tokens, job.row_tokens)
            else:
                # Small jobs must not overtake a big one of their kind forever.
                full = full or same_kind
                rest.append(job)
        self._waiting = rest
        return taken
