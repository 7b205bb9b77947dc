"""The trainer is killed, or a store goes away. Wherever that happens, the run ends with the bits of one that was never
interrupted, and `headwater audit` finds no contradiction."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any
from unittest.mock import patch

import pytest
import torch

from shared.coordination import Coordination
from shared.database import WindowRow
from shared.errors import DatabaseError, DatabaseRefusalError, HeadwaterError, StreamError, WeightStoreError
from shared.ledger import Ledger
from shared.retries import Retries
from shared.runs import Run
from shared.stream import WindowStream
from shared.weights.store import WeightStore
from tests.services.collector.processes import RedisProcess
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack, assert_equal_weights, build_stack
from tests.trainer.windows import plain_window
from trainer.checkpoint import Checkpoints
from trainer.inbox import Inbox
from trainer.lead import Lead, Order
from trainer.loop import Trainer

OPTIONS: dict[str, Any] = {"lease_s": 3.0, "steps": 6, "pairs_per_step": 4, "checkpoint_every": 100}
"""Twelve windows of three pairs: two make a step."""
NUM_WINDOWS = 12
OWNERS = (Checkpoints, Coordination, Inbox, Ledger, Run, WeightStore, WindowStream)


@pytest.fixture(scope="module")
def uninterrupted(
    redis_server: RedisProcess, policy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights after step 6."""
    stack = build_stack(tmp_path_factory.mktemp("whole"), policy_folder, redis_server.url, run="whole", **OPTIONS)
    stack.write_plain(range(NUM_WINDOWS))
    stack.train()
    return stack.weights_at(6)


@pytest.fixture(autouse=True)
def _threads_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each boundary of a step: so every place is reached at its own step, and every step is published."""
    orders = Lead.orders

    def orders_of_idle_threads(self: Lead, step: int, *, stop: bool) -> list[Order]:
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        if self.publisher._job is not None:
            concurrent.futures.wait([self.publisher._job])
        return orders(self, step, stop=stop)

    monkeypatch.setattr(Lead, "orders", orders_of_idle_threads)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_stack(own_redis: RedisProcess, policy_folder: Path, tmp_path: Path) -> Iterator[Stack]:
    stack = build_stack(tmp_path, policy_folder, own_redis.url, **OPTIONS)
    yield stack
    stack.end_trainers()


@contextmanager
def breaking(trainer: Trainer, place: str, happen: Callable[[], None], *, step: int = 4) -> Iterator[None]:
    """`happen` each time that `place` is called after `step`; before it, or where `place` ends in "+" after it."""
    owner, name = place.rstrip("+").split(".")
    (found,) = [one for one in OWNERS if one.__name__ == owner]
    original, after = getattr(found, name), place.endswith("+")

    def broken(*arguments: Any, **options: Any) -> Any:
        if trainer.step == step and not after:
            happen()
        answer = original(*arguments, **options)
        if trainer.step == step and after:
            happen()
        return answer

    with patch.object(found, name, broken):
        yield


def assert_it_ended_as_if_uninterrupted(stack: Stack, uninterrupted: dict[str, torch.Tensor]) -> None:
    assert_equal_weights(stack.weights_at(6), uninterrupted)
    assert [(row.step, row.figures["pairs"]) for row in stack.rows()] == [(step, 6) for step in range(1, 7)]
    assert (stack.counts(), stack.stream.window_ids(), stack.contradictions()) == ((NUM_WINDOWS, {}, 0), set(), [])


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer may catch it."""


def be_killed() -> None:
    raise Killed


KILLS = "WeightStore.begin WeightStore._finish+ Run.record_step Coordination.report_trainer Checkpoints.begin"
KILLS += " Checkpoints.keep_evidence Ledger.mark_trained WindowStream.acknowledge Checkpoints.prune"


@pytest.mark.parametrize("place", KILLS.split())
def test_wherever_it_is_killed_it_ends_with_the_same_bits(
    make_stack: MakeStack, uninterrupted: dict[str, torch.Tensor], place: str
) -> None:
    stack = make_stack(**OPTIONS | {"checkpoint_every": 2})
    stack.write_plain(range(NUM_WINDOWS))
    trainer = stack.prepare()
    with breaking(trainer, place, be_killed), pytest.raises(Killed):
        trainer.run()
    assert stack.contradictions() == []
    stack.train()
    assert_it_ended_as_if_uninterrupted(stack, uninterrupted)


def test_a_resumed_run_with_a_moving_reference_ends_with_the_same_bits(make_stack: MakeStack) -> None:
    options = OPTIONS | {"checkpoint_every": 2, "refresh_reference_every": 2}
    whole, cut = make_stack("whole", **options), make_stack("cut", **options)
    for stack in (whole, cut):
        stack.write_plain(range(NUM_WINDOWS))
    whole.train()
    trainer = cut.prepare()
    with breaking(trainer, "Coordination.report_trainer", be_killed), pytest.raises(Killed):
        trainer.run()
    cut.train()
    assert_it_ended_as_if_uninterrupted(cut, whole.weights_at(6))


def test_a_redis_that_is_killed_and_comes_back_loses_nothing(
    own_stack: Stack, own_redis: RedisProcess, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """Killed after step 4: the trainer then waits with one window in hand, and Redis comes back after two failures."""
    own_stack.write_plain(range(9))
    failures: list[BaseException] = []
    lock = Lock()  # loop and reader fail at the same time

    def come_back(_: int, error: BaseException) -> None:
        with lock:
            failures.append(error)
            if len(failures) != 2:
                return
            own_redis.start()
            own_stack.write_plain(range(9, NUM_WINDOWS))

    trainer = own_stack.prepare(Retries(on_failure=come_back))
    with breaking(trainer, "Coordination.report_trainer+", own_redis.stop):
        trainer.run()
    assert len(failures) >= 2
    assert_it_ended_as_if_uninterrupted(own_stack, uninterrupted)


def test_a_stop_while_redis_is_away_is_no_error_and_loses_no_step(
    own_stack: Stack, own_redis: RedisProcess, uninterrupted: dict[str, torch.Tensor]
) -> None:
    own_stack.write_plain(range(9))  # 4 steps, then it waits with one window in hand
    stop = Event()
    with ThreadPoolExecutor() as pool:
        training = pool.submit(own_stack.train, stop)
        wait_until(lambda: bool(own_stack.coordination.trainer_report()) and own_stack.report()[0] == 4, what="step 4")
        own_redis.stop()
        stop.set()
        training.result(timeout=60)
    assert (own_stack.checkpoints / "step-00000004/state.json").is_file()
    own_redis.start()
    own_stack.write_plain(range(9, NUM_WINDOWS))
    own_stack.train()
    assert_it_ended_as_if_uninterrupted(own_stack, uninterrupted)


STOPS = "WeightStore.begin Coordination.announce_weights Coordination.live_replicas Coordination.report_trainer"


@pytest.mark.parametrize("place", [*STOPS.split(), "Inbox.take", "WindowStream.read"])
def test_a_stop_while_redis_is_away_leaves_a_checkpoint_wherever_the_trainer_is(
    own_stack: Stack, own_redis: RedisProcess, uninterrupted: dict[str, torch.Tensor], place: str
) -> None:
    own_stack.write_plain(range(NUM_WINDOWS))
    stop = Event()
    trainer = own_stack.prepare(Retries(stop=stop, stopping_s=0.1))

    def go_away() -> None:
        own_redis.stop()
        Timer(0.1, stop.set).start()

    with breaking(trainer, place, go_away), pytest.raises(StreamError):
        trainer.run()
    own_redis.start()
    assert_it_resumes_where_it_was(trainer, own_stack, uninterrupted)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("WindowStream.read", StreamError),
        ("Ledger.finished_among", DatabaseError),
        ("Run.record_step", DatabaseError),
        ("Run.record_version", DatabaseRefusalError),
        ("WeightStore.begin", WeightStoreError),
    ],
)
def test_an_outage_without_end_leaves_a_checkpoint_and_stays_an_error(
    make_stack: MakeStack, uninterrupted: dict[str, torch.Tensor], place: str, error: type[HeadwaterError]
) -> None:
    def be_away() -> None:
        raise error("away")

    stack = make_stack(**OPTIONS)
    stack.write_plain(range(NUM_WINDOWS))
    trainer = stack.prepare(Retries(give_up_s=0.0))
    with breaking(trainer, place, be_away), pytest.raises(error, match="away"):
        trainer.run()
    assert_it_resumes_where_it_was(trainer, stack, uninterrupted)


def assert_it_resumes_where_it_was(trainer: Trainer, stack: Stack, uninterrupted: dict[str, torch.Tensor]) -> None:
    """No step is redone. It ended after step 4, or 5 where the reader met the outage while that step was computed."""
    assert trainer.step in (4, 5)
    assert trainer.checkpointed_step == trainer.step
    resumed = stack.prepare()
    assert resumed.step == trainer.step
    resumed.run()
    assert_it_ended_as_if_uninterrupted(stack, uninterrupted)


def test_the_error_that_is_raised_is_the_one_that_ended_it(make_stack: MakeStack) -> None:
    """The disk is full as well."""
    stack = make_stack(**OPTIONS)
    stack.write_plain(range(NUM_WINDOWS))
    trainer = stack.prepare(Retries(give_up_s=0.0))

    def be_away() -> None:
        if not stack.checkpoints.exists():
            stack.checkpoints.write_text("in the way")
        raise StreamError("away")

    with breaking(trainer, "WindowStream.read", be_away), pytest.raises(StreamError, match="away"):
        trainer.run()


LONG: dict[str, Any] = {"steps": 55, "pairs_per_step": 3, "checkpoint_every": 100, "warmup_steps": 10}


def write_long(stack: Stack) -> None:
    """For each update a window that was sampled ten steps before it. Four more are 20 steps old by then: stale."""
    versions = [max(0, number - 10) for number in range(55)]
    for number in (54, 45, 36, 27):
        versions.insert(number, number - 20)
    stack.write(plain_window(place, version=version, run=stack.run) for place, version in enumerate(versions))


def updates(stack: Stack) -> dict[str, tuple[str, int | None]]:
    """State and update of each window."""
    return {row.source_id: (row.state, row.trained_step) for row in stack.rows(WindowRow)}


def test_a_run_killed_after_step_49_drops_nothing_that_an_uninterrupted_one_trains(make_stack: MakeStack) -> None:
    """By default the first checkpoint is that of step 50: all 49 steps are redone, and the loaded weights get a version
    far above those of the rollouts. In steps, nothing has aged."""
    whole, cut = make_stack("whole", **LONG), make_stack("cut", **LONG)
    for stack in (whole, cut):
        assert stack.settings.trainer.max_policy_lag == 16
        write_long(stack)
    whole.train()
    trainer = cut.prepare()
    with breaking(trainer, "Coordination.report_trainer+", be_killed, step=49), pytest.raises(Killed):
        trainer.run()
    assert not cut.checkpoints.exists()
    cut.train()
    assert updates(cut) == updates(whole)
    assert whole.counts() == (55, {"stale": 4}, 0)
    assert_equal_weights(cut.weights_at(55), whole.weights_at(55))
    assert [row.figures["policy_lag_max"] for row in cut.rows()] == [min(step, 10) for step in range(55)]
    assert cut.contradictions() == []
