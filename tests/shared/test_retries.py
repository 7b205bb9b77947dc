"""One way to wait: what is retried, for how long, and what is said about it."""

import asyncio
import time
from collections.abc import Callable
from threading import Event

import pytest

from shared.errors import DatabaseError, DatabaseRefusalError, OverloadedError, StreamError, WeightStoreError
from shared.retries import Retries, doubled_s


class Flaky:
    """Fails `failures` times, then answers 7."""

    def __init__(self, failures: float, error: type[Exception] = StreamError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error("away")
        return 7


def blocking(retries: Retries, call: Callable[[], int]) -> int:
    return retries(call)


def awaited(retries: Retries, call: Callable[[], int]) -> int:
    async def attempt() -> int:
        return call()

    return asyncio.run(retries.wait_for(lambda: attempt()))


both = pytest.mark.parametrize("run", [blocking, awaited])
Run = Callable[[Retries, Callable[[], int]], int]


@both
@pytest.mark.parametrize("error", [StreamError, DatabaseError])
def test_a_call_is_repeated_until_it_answers(
    run: Run, error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(Retries(max_wait_s=0.001), Flaky(20, error)) == 7
    assert len(caplog.records) == 6  # attempts 1, 2, 4, 8, 16, and the return


@both
@pytest.mark.parametrize("error", [WeightStoreError, DatabaseRefusalError, KeyError])
def test_what_no_retry_can_mend_is_raised_at_once(run: Run, error: type[Exception]) -> None:
    flaky = Flaky(1, error)
    with pytest.raises(error, match="away"):
        run(Retries(), flaky)
    assert flaky.calls == 1


@both
def test_it_gives_up_with_the_last_error(run: Run) -> None:
    with pytest.raises(StreamError, match="away"):
        run(Retries(max_wait_s=0.001, give_up_s=0.05), Flaky(10**9))
    flaky = Flaky(10**9)
    with pytest.raises(StreamError, match="away"):
        run(Retries(max_wait_s=0.001, max_attempts=3), flaky)
    assert flaky.calls == 3


def test_once_asked_to_stop_it_gives_up_soon() -> None:
    stop, began = Event(), time.monotonic()
    retries = Retries(stop=stop, stopping_s=0.0, on_failure=lambda *_: stop.set())
    with pytest.raises(StreamError):
        retries(Flaky(10**9))
    assert time.monotonic() - began < 5


@both
def test_failures_are_told_instead_of_logged(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[int, str]] = []
    retries = Retries(max_wait_s=0.001, on_failure=lambda attempt, error: told.append((attempt, str(error))))
    assert run(retries, Flaky(2)) == 7
    assert (told, caplog.records) == ([(1, "away"), (2, "away")], [])


class Busy(OverloadedError):
    retry_after_s = 0.3


def test_a_service_may_ask_for_a_longer_wait() -> None:
    began = time.monotonic()
    Retries(max_wait_s=0.001)(Flaky(1, Busy))
    assert time.monotonic() - began >= 0.3


def test_waits_double_up_to_their_bound_and_have_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [doubled_s(attempt, first_s=0.25, max_s=1.5) for attempt in range(1, 6)] == [0.25, 0.5, 1.0, 1.5, 1.5]
    assert doubled_s(10**9, first_s=1, max_s=60) == 60
    waits: list[float] = []
    monkeypatch.setattr(Event, "wait", lambda _, wait_s: waits.append(wait_s))
    Retries(max_wait_s=1.5)(Flaky(5))
    expected = (0.25, 0.5, 1.0, 1.5, 1.5)
    assert all(longest / 2 <= wait_s <= longest for wait_s, longest in zip(waits, expected, strict=True))
