from threading import Event

import pytest

from shared.errors import DatabaseError, DatabaseRefusalError, StreamError, WeightStoreError
from trainer.patience import Patience


class Flaky:
    """Fails `failures` times, then answers 7."""

    def __init__(self, failures: int, error: type[Exception] = StreamError) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error("away")
        return 7


@pytest.mark.parametrize("error", [StreamError, DatabaseError])
def test_a_call_is_repeated_until_it_answers(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    assert Patience(Event(), max_backoff_s=0.001)(Flaky(20, error)) == 7
    assert len(caplog.records) == 6  # attempts 1, 2, 4, 8, 16, and the return


def test_it_gives_up_with_the_error_itself() -> None:
    with pytest.raises(StreamError, match="away"):
        Patience(Event(), give_up_s=0.05, max_backoff_s=0.001)(Flaky(10**9))


def test_once_asked_to_stop_it_gives_up_soon() -> None:
    stop = Event()
    stop.set()
    with pytest.raises(StreamError):
        Patience(stop, stopping_s=0.0)(Flaky(10**9))


def test_other_errors_are_not_repeated() -> None:
    flaky = Flaky(1, WeightStoreError)
    with pytest.raises(WeightStoreError):
        Patience(Event())(flaky)
    assert flaky.calls == 1


def test_what_the_database_refuses_is_not_repeated() -> None:
    flaky = Flaky(1, DatabaseRefusalError)
    with pytest.raises(DatabaseRefusalError):
        Patience(Event(), max_backoff_s=0.001)(flaky)
    assert flaky.calls == 1
