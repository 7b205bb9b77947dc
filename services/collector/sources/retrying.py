"""Reads again what could not be read for a moment: a stream whose connection broke, a file on a disk that hiccuped.

Records are read again from the one that failed, so a retry neither skips nor doubles any. A source that fails before
it gave its first record is a matter of settings and fails at once. Called by dealing.py, in the source threads.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from services.collector.backoff import Backoff
from services.collector.sources.base import RawRecord, Reader
from shared import metrics
from shared.errors import SourceError, SourceReadError

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_GIVE_UP_S = 900.0
"""As long as the trainer waits for Redis or the database."""
_MAX_BACKOFF_S = 10.0
_SERVICE = "documents"
"""Their name among what a collector waits for, in its metrics."""


class Retries:
    """Shared by all parts of one source: what one of them could read was no matter of settings."""

    def __init__(self, *, give_up_s: float = _GIVE_UP_S, max_backoff_s: float = _MAX_BACKOFF_S) -> None:
        """After `give_up_s` of failures in a row SourceError is raised."""
        self._give_up_s = give_up_s
        self._max_backoff_s = max_backoff_s
        self._has_read = False
        self._has_loaded = False
        self.trouble = ""
        """Why the last read failed; empty when it succeeded."""

    def records(self, reader: Reader, *, start: int, step: int) -> Iterator[RawRecord]:
        """What `reader.read` gives."""
        is_resumed = start >= step
        failures = _Failures(self._give_up_s, self._max_backoff_s)
        while True:
            try:
                for record in reader.read(start=start, step=step):
                    self._has_read = True
                    self._note_read(failures)
                    yield record
                    start += step
                return
            except SourceReadError as exc:
                if not (self._has_read or is_resumed):
                    raise
                self._wait(failures, exc)

    def loaded(self, load: Callable[[], _T]) -> _T:
        """What `load` gives, which reads one record."""
        failures = _Failures(self._give_up_s, self._max_backoff_s)
        while True:
            try:
                found = load()
            except SourceReadError as exc:
                if not self._has_loaded:
                    raise
                self._wait(failures, exc)
            else:
                self._has_loaded = True
                self._note_read(failures)
                return found

    def _note_read(self, failures: "_Failures") -> None:
        if failures.number:
            _log.info("the documents are read again after %d failed attempts", failures.number)
            failures.end()
            self.trouble = ""
            metrics.service_up.labels(_SERVICE).set(1)

    def _wait(self, failures: "_Failures", exc: SourceReadError) -> None:
        self.trouble = str(exc)
        metrics.service_up.labels(_SERVICE).set(0)
        pause_s = failures.next_pause_s(exc)
        metrics.service_retries_total.labels(_SERVICE).inc()
        _log.warning("reading the documents failed, trying again in %.1f s: %s", pause_s, exc)
        time.sleep(pause_s)


class _Failures:
    """Failures in a row of one reader."""

    def __init__(self, give_up_s: float, max_backoff_s: float) -> None:
        self._give_up_s = give_up_s
        self._max_backoff_s = max_backoff_s
        self.end()

    def end(self) -> None:
        """A read succeeded."""
        self.number = 0
        self._backoff = Backoff(self._max_backoff_s)

    def next_pause_s(self, exc: SourceReadError) -> float:
        """How long to wait after one more. Raises SourceError when there have been failures for too long."""
        if not self.number:
            self._began = time.monotonic()
        self.number += 1
        lasted_s = time.monotonic() - self._began
        if lasted_s > self._give_up_s:
            raise SourceError(f"the documents could not be read for {lasted_s:.0f} s, the last time: {exc}") from exc
        return self._backoff.next_s()
