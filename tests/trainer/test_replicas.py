"""Which replicas live, which are late, and which the trainer waits for. A real Redis."""

import time
from collections.abc import Callable
from threading import Event, Timer

import pytest

from shared import metrics
from shared.database import EventRow
from tests.trainer.conftest import MakeStack, Stack
from tests.trainer.windows import candidate, chunk, window
from trainer.publisher import PublishedSteps
from trainer.replicas import Replicas


def replicas_of(stack: Stack, *, max_wait_s: float, stop: Event | None = None) -> Replicas:
    """The weights after step n are version n // 2: pushed every second step, up to step 8."""
    published = PublishedSteps({version: 2 * version for version in range(5)})
    return Replicas(
        stack.coordination, stack.records, published, max_lag=2, max_wait_s=max_wait_s, stop=stop or Event()
    )


def say(stack: Stack, replica: str, version: int, lifetime_s: float = 30.0) -> None:
    stack.coordination.report_replica(replica, version, lifetime_s=lifetime_s)


def seconds_of(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def waits(outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("headwater_replica_waits_total", {"outcome": outcome}) or 0.0


def version_shown(replica: str) -> float | None:
    return metrics.REGISTRY.get_sample_value("headwater_replica_version", {"replica": replica})


def test_every_live_replica_is_shown_with_its_version(make_stack: MakeStack) -> None:
    stack = make_stack()
    replicas = replicas_of(stack, max_wait_s=0)
    say(stack, "a", 3)
    say(stack, "b", 5, lifetime_s=0.05)
    replicas.keep_up(9)
    assert (version_shown("a"), version_shown("b")) == (3, 5)
    time.sleep(0.1)
    replicas.keep_up(9)
    assert (version_shown("a"), version_shown("b")) == (3, None)
    assert metrics.REGISTRY.get_sample_value("headwater_live_replicas") == 1
    stack.coordination.forget_replica("a")  # it stops in good order
    assert stack.coordination.live_replicas() == {}


def test_by_default_nobody_is_waited_for(make_stack: MakeStack) -> None:
    stack = make_stack()
    say(stack, "late", 0)
    assert stack.settings.trainer.replica_wait_s == 0
    assert seconds_of(lambda: replicas_of(stack, max_wait_s=0).keep_up(100)) < 0.5


@pytest.mark.parametrize(("served", "then"), [(2, 3), (41, 4)])
def test_a_replica_late_or_ahead_is_waited_for_until_it_is_near(make_stack: MakeStack, served: int, then: int) -> None:
    """Version 2 is 3 steps old after step 7. One ahead of all is on weights of another epoch."""
    stack = make_stack()
    say(stack, "far", served)
    before = waits("caught_up")
    Timer(0.2, lambda: say(stack, "far", then)).start()
    assert 0.15 < seconds_of(lambda: replicas_of(stack, max_wait_s=20).keep_up(7)) < 5
    assert waits("caught_up") == before + 1


@pytest.mark.parametrize("served", [3, 4])
def test_one_within_the_lag_is_not(make_stack: MakeStack, served: int) -> None:
    stack = make_stack()
    say(stack, "near", served)
    before = waits("caught_up")
    assert seconds_of(lambda: replicas_of(stack, max_wait_s=20).keep_up(7)) < 5
    assert waits("caught_up") == before


def test_a_replica_that_dies_meanwhile_is_waited_for_no_longer(make_stack: MakeStack) -> None:
    stack = make_stack()
    say(stack, "dying", 0, lifetime_s=0.3)
    assert seconds_of(lambda: replicas_of(stack, max_wait_s=20).keep_up(7)) < 5


def test_the_wait_is_bounded_told_and_not_repeated_until_the_replica_moves(make_stack: MakeStack) -> None:
    stack = make_stack()
    say(stack, "stuck", 0)
    replicas, before = replicas_of(stack, max_wait_s=0.3), waits("given_up")
    assert seconds_of(lambda: replicas.keep_up(7)) >= 0.3
    assert seconds_of(lambda: replicas.keep_up(8)) < 0.25
    assert waits("given_up") == before + 1
    say(stack, "stuck", 1)
    assert seconds_of(lambda: replicas.keep_up(8)) >= 0.3
    events = [(event.kind, event.data) for event in stack.rows(EventRow)]
    assert events == [("late_replicas", {"replicas": {"stuck": version}}) for version in (0, 1)]


def test_a_stop_ends_the_wait(make_stack: MakeStack) -> None:
    stack, stop = make_stack(), Event()
    say(stack, "stuck", 0)
    Timer(0.2, stop.set).start()
    assert seconds_of(lambda: replicas_of(stack, max_wait_s=60, stop=stop).keep_up(7)) < 5


def test_the_loop_waits_where_it_is_asked_to(make_stack: MakeStack) -> None:
    """Version 0, of step 0, is near before the first step and late before the second. No window has a rollout."""
    stack = make_stack(steps=2, pairs_per_step=1, max_policy_lag=0, replica_wait_s=0.3)
    say(stack, "stuck", 0)
    pool = [candidate("original", 1), candidate("rewrite", 2)]
    stack.write(window(number, [chunk(4, pool, (1.0, 0.0))], run=stack.run) for number in range(2))
    before = waits("given_up")
    assert stack.prepare().run() == "finished"
    assert version_shown("stuck") == 0
    assert waits("given_up") == before + 1
    late = [event.data for event in stack.rows(EventRow) if event.kind == "late_replicas"]
    assert late == [{"replicas": {"stuck": 0}}]
    assert stack.figures()[1]["seconds_wait_replicas"] >= 0.3
