"""One way to wait for what is away: Redis, the database, a service, the documents. On top of tenacity.

A `retryable` error is tried again after 0.25 s, then 0.5 s, 1 s, ... up to `max_wait_s`, with jitter; all others are
raised at once. What is retried must be safe to do twice.

    retries = Retries(give_up_s=900, stop=stop)
    retries(lambda: ledger.mark_trained(steps))                  # blocks the thread between attempts
    answer = await retries.wait_for(lambda: post(request))       # a coroutine
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception

from shared.errors import HeadwaterError

FIRST_WAIT_S = 0.25
_STOPPING_POLL_S = 0.5
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def doubled_s(attempt: int, *, first_s: float, max_s: float) -> float:
    """Seconds to wait after failed attempt 1, 2, 3, ...: `first_s` doubled each time, `max_s` at most."""
    return min(max_s, first_s * 2.0 ** min(attempt - 1, 60))


@dataclass
class Retries:
    """A policy; each call has its own series of attempts. Safe for many threads and tasks at once."""

    max_wait_s: float = 10.0
    give_up_s: float = math.inf
    """The last error is raised after this long, counted from the call's beginning."""
    max_attempts: int = 0
    """Or after so many attempts; 0: no bound."""
    stop: Event = field(default_factory=Event)
    stopping_s: float = 3.0
    """Takes the place of `give_up_s` once `stop` is set."""
    on_failure: Callable[[int, BaseException], None] | None = None
    """Called before each wait with the attempt's number and its error, instead of logging them."""

    def __call__(self, call: Callable[[], _T]) -> _T:
        retrying = Retrying(sleep=self._sleep, **self._policy())
        answer = retrying(call)
        self._note_return(retrying.statistics["attempt_number"])
        return answer

    async def wait_for(self, call: Callable[[], Awaitable[_T]]) -> _T:
        retrying = AsyncRetrying(sleep=asyncio.sleep, **self._policy())

        async def attempt() -> _T:  # tenacity awaits no lambda that returns a coroutine
            return await call()

        answer: _T = await retrying(attempt)
        self._note_return(retrying.statistics["attempt_number"])
        return answer

    def _policy(self) -> dict[str, Any]:
        return {
            "retry": retry_if_exception(lambda error: isinstance(error, HeadwaterError) and error.retryable),
            "wait": self._wait_s,
            "stop": self._gives_up,
            "before_sleep": self._note_failure,
            "reraise": True,
        }

    def _wait_s(self, state: RetryCallState) -> float:
        """Half to all of the doubled wait, or what the service asked for (`retry_after_s`) if that is longer."""
        wait_s = doubled_s(state.attempt_number, first_s=FIRST_WAIT_S, max_s=self.max_wait_s) * random.uniform(0.5, 1.0)
        return max(wait_s, getattr(_error(state), "retry_after_s", 0.0))

    def _gives_up(self, state: RetryCallState) -> bool:
        spent_s = state.seconds_since_start or 0.0
        is_last = state.attempt_number == self.max_attempts
        return is_last or spent_s > (self.stopping_s if self.stop.is_set() else self.give_up_s)

    def _sleep(self, wait_s: float) -> None:
        if self.stop.is_set():
            time.sleep(min(wait_s, _STOPPING_POLL_S))
        else:
            self.stop.wait(wait_s)

    def _note_failure(self, state: RetryCallState) -> None:
        attempt, error = state.attempt_number, _error(state)
        assert error is not None
        if self.on_failure:
            self.on_failure(attempt, error)
        elif attempt & (attempt - 1) == 0:  # 1, 2, 4, 8, ...: a long outage stays a few lines
            _log.warning("waiting (attempt %d): %s", attempt, error)

    def _note_return(self, num_attempts: int) -> None:
        if num_attempts > 1 and not self.on_failure:
            _log.warning("back after %d failed attempts", num_attempts - 1)


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None
