"""Redis or the database goes away under the trainer: it waits, and where it has to end it ends with a checkpoint of its
newest step, from which the next start goes on as if nothing had been."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import redis
import torch

from shared.coordination import Coordination
from shared.errors import DatabaseError, DatabaseRefusalError, HeadwaterError, StreamError, WeightStoreError
from shared.runs import open_run
from shared.settings import Settings
from shared.stream import WindowStream
from tests.trainer.conftest import RedisServer, Stack, free_port
from tests.trainer.test_trainer_process import Process, weights_at
from tests.trainer.test_trainer_runs import rows_of
from tests.trainer.windows import plain_window
from trainer.assembly import train
from trainer.loop import Trainer
from trainer.preferences import Preference

MakeStack = Callable[..., Stack]
OPTIONS = {"steps": 6, "pairs_per_step": 4, "checkpoint_every": 100}


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(free_port(), folder)
    server.start()
    yield server
    server.kill()


def on_redis(stack: Stack, server: RedisServer) -> Stack:
    settings = Settings.model_validate(stack.settings.model_dump() | {"redis": {"url": server.url}})
    client = redis.Redis.from_url(server.url)
    return Stack(settings, WindowStream(client, stack.run), Coordination(client, stack.run), open_run(settings))


def write(stack: Stack, numbers: range) -> None:
    stack.write(plain_window(number, run=stack.run) for number in numbers)


def assert_it_ends_as_if_uninterrupted(stack: Stack, whole: Stack) -> None:
    """Both have read the same eight windows: 24 pairs, 6 steps."""
    redone: list[int] = []
    trainer: Any = stack.prepare()
    take_step = trainer.take_step

    def noting(pairs: list[Preference]) -> None:
        redone.append(trainer.step + 1)
        take_step(pairs)

    trainer.take_step = noting
    first = trainer.step + 1
    trainer.run()
    assert redone == list(range(first, 7))
    train(whole.settings, Event())
    expected, found = weights_at(whole, 6), weights_at(stack, 6)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [row.step for row in rows_of(stack)] == [1, 2, 3, 4, 5, 6]
    assert [row.figures["pairs"] for row in rows_of(stack)] == [4] * 6
    assert (stack.ledger.balance().trained, stack.stream.window_ids()) == (8, set())
    assert stack.contradictions() == []


def test_a_redis_that_is_killed_and_comes_back_loses_nothing(make_stack: MakeStack, own_redis: RedisServer) -> None:
    """Killed when the second step is done: the trainer then waits in `fill` with a pair in hand, and Redis comes back
    only when a call has failed."""
    stack, whole = on_redis(make_stack(**OPTIONS), own_redis), make_stack("whole", **OPTIONS)
    write(stack, range(3))  # 9 pairs
    trainer: Any = stack.prepare()
    failures: list[str] = []
    report, wait_or_give_up = trainer.coordination.report_trainer, trainer.patience._wait_or_give_up

    def report_then_kill(said: Any) -> None:
        report(said)
        if trainer.step == 2 and not failures:
            own_redis.kill()

    def restart(exc: Any, *arguments: Any) -> None:
        failures.append(str(exc))
        if len(failures) == 2:
            own_redis.start()
            write(stack, range(3, 8))
        wait_or_give_up(exc, *arguments)

    trainer.coordination.report_trainer = report_then_kill
    trainer.patience._wait_or_give_up = restart
    trainer.run()
    assert len(failures) >= 2
    assert (stack.ledger.balance().trained, stack.stream.window_ids()) == (8, set())
    write(whole, range(8))
    train(whole.settings, Event())
    assert all(torch.equal(one, weights_at(stack, 6)[name]) for name, one in weights_at(whole, 6).items())


def test_a_process_that_is_stopped_while_redis_is_away_loses_no_step(
    make_stack: MakeStack, own_redis: RedisServer, tmp_path: Path
) -> None:
    stack, whole = on_redis(make_stack(**OPTIONS), own_redis), make_stack("whole", **OPTIONS)
    write(stack, range(6))  # 18 pairs: 4 steps, then it waits with 2 pairs in hand
    write(whole, range(8))
    process = Process(stack, tmp_path / "config.toml")
    process.wait_for_step(4)
    own_redis.kill()
    status, errors = process.end(signal.SIGTERM)
    assert (status, "Traceback" in errors) == (0, False), errors
    assert (stack.settings.run.folder / "checkpoints/step-00000004/state.json").is_file()
    own_redis.start()
    write(stack, range(6, 8))
    assert_it_ends_as_if_uninterrupted(stack, whole)


def break_at(trainer: Trainer, place: str, happen: Callable[[], None]) -> None:
    """`happen` in the moment before `place` is called, once step 4 is applied."""
    component, name = place.split(".")
    inbox = trainer.inbox
    owners = {"stream": inbox._stream, "ledger": inbox._ledger, "sinks": trainer.sinks[0]}
    owner = owners.get(component) or getattr(trainer, component)
    original = getattr(owner, name)

    def breaking(*arguments: Any, **options: Any) -> Any:
        if trainer.step == 4:
            happen()
        return original(*arguments, **options)

    setattr(owner, name, breaking)


PLACES = [
    "publisher._write",
    "coordination.announce_weights",
    "coordination.live_replicas",
    "coordination.report_trainer",
    "inbox.fill",
    "stream.read",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_stop_while_redis_is_away_leaves_a_checkpoint_wherever_the_trainer_is(
    make_stack: MakeStack, own_redis: RedisServer, place: str
) -> None:
    stack, whole, stop = on_redis(make_stack(**OPTIONS), own_redis), make_stack("whole", **OPTIONS), Event()
    for one in (stack, whole):
        write(one, range(8))
    trainer = stack.prepare(stop)
    trainer.patience._stopping_s = 0.2

    def go_away() -> None:
        own_redis.kill()
        Timer(0.3, stop.set).start()

    break_at(trainer, place, go_away)
    with pytest.raises(StreamError):
        trainer.run()
    assert (trainer.step, trainer.checkpointed_step) == (4, 4)
    own_redis.start()
    assert_it_ends_as_if_uninterrupted(stack, whole)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("stream.read", StreamError),
        ("ledger.finished_among", DatabaseError),
        ("sinks.write", DatabaseError),
        ("publisher._write_row", DatabaseRefusalError),
        ("publisher._write", WeightStoreError),
    ],
)
def test_an_end_of_patience_leaves_a_checkpoint_and_stays_an_error(
    make_stack: MakeStack, place: str, error: type[HeadwaterError]
) -> None:
    def be_away() -> None:
        raise error("away")

    stack, whole = make_stack(**OPTIONS), make_stack("whole", **OPTIONS)
    for one in (stack, whole):
        write(one, range(8))
    trainer = stack.prepare()
    trainer.patience._give_up_s = 0.0
    break_at(trainer, place, be_away)
    with pytest.raises(error, match="away"):
        trainer.run()
    assert (trainer.step, trainer.checkpointed_step) == (4, 4)
    assert_it_ends_as_if_uninterrupted(stack, whole)


def test_the_error_that_is_told_is_the_one_that_ended_it(make_stack: MakeStack) -> None:
    """The disk is full as well."""
    stack = make_stack(**OPTIONS)
    write(stack, range(8))
    trainer = stack.prepare()
    trainer.patience._give_up_s = 0.0

    def be_away() -> None:
        (stack.settings.run.folder / "checkpoints").write_text("in the way")
        raise StreamError("away")

    break_at(trainer, "stream.read", be_away)
    with pytest.raises(StreamError, match="away"):
        trainer.run()
