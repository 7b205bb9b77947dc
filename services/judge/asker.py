"""Asks the judge's engine: so many calls at once, older requests first, and again where the engine failed.

    asker = Asker(engine, max_at_once=1024, patience_s=30.0)
    generations = await asker.generate(prompt, Sampling(max_tokens=64), turn=7)    # turn: the request's place in line

The unit of retry is one call: its siblings know nothing of it. A caller that is cancelled leaves the line at once, and
a call in the engine is cancelled with it.

    up    every failed call waits by itself, without its place, and then goes first
    down  8 failures without a success: one call at a time tries the engine, all others wait in the line
    lost  down for longer than the patience: all who wait get the engine's error; the next call tries again, alone
"""

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from services.engine.base import Engine, Generation, Prompt, Sampling
from shared import metrics
from shared.errors import EngineError, HeadwaterError
from shared.retries import FIRST_WAIT_S, doubled_s

_log = logging.getLogger(__name__)

T = TypeVar("T")

_DOWN_AFTER = 8
"""Failures without a success between them. Of an engine that fails one call in ten, this is one series in 1e8."""
_MAX_WAIT_S = 5.0
_ADMITTED_AT_ONCE = 8
"""In one turn of the event loop, which runs all that is ready before it looks at anything else: a thousand calls let in
together would keep health checks waiting for a third of a second. 1,000 calls are let in within milliseconds anyway."""


class FramedPrompt(Protocol):
    @property
    def key(self) -> bytes:
        """A digest of all that the engine sees."""

    def build(self) -> Prompt:
        """Joins ready pieces, which takes microseconds."""


class Asker:
    """One for each engine, shared by all criteria that it answers. Belongs to one event loop."""

    def __init__(self, engine: Engine, *, max_at_once: int, patience_s: float) -> None:
        """`patience_s`: how long a call is tried again, counted from its first failure."""
        self.engine = engine
        self._patience_s = patience_s
        self._line = _Line(engine.name, num_places=max_at_once, patience_s=patience_s)

    async def generate(self, prompt: FramedPrompt, sampling: Sampling, *, turn: int) -> list[Generation]:
        """The samples of one prompt. PromptError, RequestError; EngineError once patience is at an end."""
        return await self.call(lambda: self._generate(prompt, sampling), turn=turn)

    async def _generate(self, prompt: FramedPrompt, sampling: Sampling) -> list[Generation]:
        (generations,) = await self.engine.generate([prompt.build()], sampling)
        if not generations:
            raise EngineError(f"{self.engine.name} answered {sampling.num_samples} questions with no sample at all")
        return generations

    async def score(
        self, prompt: FramedPrompt, continuations: Sequence[str], *, turn: int, adapter: str = ""
    ) -> list[list[float]]:
        """`Engine.score`, with the same errors."""
        return await self.call(
            lambda: self.engine.score(prompt.build(), continuations, adapter=adapter),
            turn=turn,
        )

    async def call(self, work: Callable[[], Awaitable[T]], *, turn: int) -> T:
        """What `work()` gives. It is called again after each retryable error, so it must be safe to do twice."""
        failed_at = 0.0
        for attempt in itertools.count(1):
            try:
                async with self._line.place(is_new=attempt == 1, turn=turn):
                    return await work()
            except HeadwaterError as exc:
                now = asyncio.get_running_loop().time()
                failed_at = failed_at or now
                if not exc.retryable or self._line.is_lost or now - failed_at >= self._patience_s:
                    raise
            metrics.judge_engine_retries_total.inc()
            wait_s = doubled_s(attempt, first_s=FIRST_WAIT_S, max_s=_MAX_WAIT_S) * random.uniform(0.5, 1.0)
            await asyncio.sleep(min(wait_s, failed_at + self._patience_s - now))
        raise AssertionError("the loop above has no end")


class _Line:
    """Who waits for a place in the engine, and whether the engine works."""

    def __init__(self, name: str, *, num_places: int, patience_s: float) -> None:
        self._name = name
        self._num_places = num_places
        self._patience_s = patience_s
        self._num_inside = 0
        self._waiting: list[tuple[bool, int, int, asyncio.Future[bool]]] = []
        """A heap: calls that failed before new ones, then by turn, then by arrival. Cancelled ones stay until they are
        first."""
        self._arrivals = itertools.count()
        self._num_admitted = 0
        """In this turn of the event loop."""
        self._num_failures = 0
        """Since the last success."""
        self._failing_since = 0.0
        self._num_trials = 0
        self._trial_at = 0.0
        self._has_trial = False

    @property
    def is_down(self) -> bool:
        return self._num_failures >= _DOWN_AFTER

    @property
    def is_lost(self) -> bool:
        return self.is_down and self._now() >= self._failing_since + self._patience_s

    @contextlib.asynccontextmanager
    async def place(self, *, is_new: bool, turn: int) -> AsyncIterator[None]:
        """Waits for a place. The error of the engine is raised here too if everybody gives it up."""
        is_trial = await self._enter(is_new, turn)
        try:
            yield
        except HeadwaterError as exc:
            if exc.retryable:
                self._note_failure(exc, is_trial)
            else:
                self._note_success()  # it refuses this call, but it works
            raise
        else:
            self._note_success()
        finally:
            self._leave(is_trial)

    async def _enter(self, is_new: bool, turn: int) -> bool:
        """Whether this call is the one that tries an engine that is down."""
        entered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (is_new, turn, next(self._arrivals), entered))
        self._admit()
        metrics.judge_waiting_questions.inc()
        try:
            return await entered
        except asyncio.CancelledError:
            if entered.done() and not entered.cancelled() and entered.exception() is None:
                self._leave(entered.result())  # let in and cancelled in the same moment
            raise
        finally:
            metrics.judge_waiting_questions.dec()

    def _admit(self) -> None:
        while self._waiting and self._has_room() and self._num_admitted < _ADMITTED_AT_ONCE:
            *_, entered = heapq.heappop(self._waiting)
            if not entered.done():
                self._num_inside += 1
                self._has_trial = self.is_down
                entered.set_result(self.is_down)
                self._num_admitted += 1
                if self._num_admitted == 1:
                    asyncio.get_running_loop().call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._num_admitted = 0
        self._admit()

    def _has_room(self) -> bool:
        if self.is_down:
            return not self._has_trial and self._now() >= self._trial_at
        return self._num_inside < self._num_places

    def _leave(self, is_trial: bool) -> None:
        self._num_inside -= 1
        if is_trial:
            self._has_trial = False
        self._admit()

    def _note_success(self) -> None:
        if self.is_down:
            _log.warning("%s answers again", self._name)
        self._num_failures = self._num_trials = 0

    def _note_failure(self, error: HeadwaterError, is_trial: bool) -> None:
        self._num_failures += 1
        if self._num_failures == 1:
            self._failing_since = self._now()
        if self._num_failures == _DOWN_AFTER:
            _log.warning("%s fails, one call at a time tries it: %s", self._name, error)
        if is_trial or self._num_failures == _DOWN_AFTER:
            self._put_off_trial()
        if self.is_lost:
            self._trial_at = 0.0
            self._refuse_all(error)

    def _put_off_trial(self) -> None:
        self._num_trials += 1
        wait_s = doubled_s(self._num_trials, first_s=FIRST_WAIT_S, max_s=_MAX_WAIT_S)
        self._trial_at = self._now() + wait_s
        asyncio.get_running_loop().call_later(wait_s, self._admit)

    def _refuse_all(self, error: HeadwaterError) -> None:
        waiting, self._waiting = self._waiting, []
        for *_, entered in waiting:
            if not entered.done():
                entered.set_exception(type(error)(str(error)))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
