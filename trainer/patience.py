"""Waiting out a Redis or a database that is away: every blocking call of the trainer goes through this."""

import logging
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from shared.errors import DatabaseError, StreamError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Patience:
    """Repeats a call while it fails with a retryable StreamError or DatabaseError; everything repeated must be
    idempotent. What the database refuses is raised at once."""

    def __init__(
        self, stop: Event, *, give_up_s: float = 900.0, max_backoff_s: float = 10.0, stopping_s: float = 3.0
    ) -> None:
        """After `give_up_s` of failures, or `stopping_s` once `stop` is set, the error is raised."""
        self._stop = stop
        self._give_up_s = give_up_s
        self._max_backoff_s = max_backoff_s
        self._stopping_s = stopping_s

    def __call__(self, call: Callable[[], _T]) -> _T:
        began, attempt = time.monotonic(), 0
        while True:
            try:
                answer = call()
            except (StreamError, DatabaseError) as exc:
                attempt += 1
                self._wait_or_give_up(exc, attempt, time.monotonic() - began)
            else:
                if attempt:
                    _log.warning("back after %d failed attempts", attempt)
                return answer

    def _wait_or_give_up(self, exc: StreamError | DatabaseError, attempt: int, spent_s: float) -> None:
        if not exc.retryable or spent_s > (self._stopping_s if self._stop.is_set() else self._give_up_s):
            raise exc
        if attempt & (attempt - 1) == 0:  # 1, 2, 4, 8, ...: a long outage stays a few lines
            _log.warning("waiting (attempt %d): %s", attempt, exc)
        pause = min(self._max_backoff_s, 0.25 * 2 ** min(attempt - 1, 10))
        if self._stop.is_set():
            time.sleep(min(pause, 0.5))
        else:
            self._stop.wait(pause)
