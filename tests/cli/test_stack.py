"""Deaths of processes are restarted, told and bounded; the roles are played by small programs. An embedded Redis opens
only to the run's token, and what it has answered survives a SIGKILL."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis

import cli.stack
from cli.plan import REDIS_HOST, Plan, Ports, child_environ, redis_url
from cli.processes import Child
from cli.run_folder import RunFolder
from cli.stack import (
    ProcessFailed,
    Stack,
    answers,
    find_redis_server,
    server_configuration,
    wait_until_it_answers,
)
from shared.errors import HeadwaterError
from shared.settings import Secrets, Settings

SLEEP = "import time; time.sleep(100)"
PASSWORD = 'a "quoted" \\ pässword/@'


@dataclass(frozen=True)
class _Programs(Plan):
    """A plan whose roles run the given programs."""

    programs: dict[str, str] = field(default_factory=dict)
    is_ready: bool = False
    """Services count as ready as soon as they run."""

    def command(self, role: str) -> list[str]:
        return [sys.executable, "-Sc", self.programs[role]]

    def ready_url(self, role: str) -> str | None:
        return None if self.is_ready else super().ready_url(role)


@pytest.fixture
def told() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def stack(tmp_path: Path, told: list[tuple[str, str]]) -> Iterator[Callable[..., Stack]]:
    stacks: list[Stack] = []

    def make(interrupted: bool = False, over: bool = True, ready: bool = False, **programs: str) -> Stack:
        roles = tuple(programs)
        plan = _Programs(Settings(), Secrets(token="t"), roles, None, (), programs, ready)
        folder = RunFolder(tmp_path)
        folder.create()
        tell = lambda role, kind, _text: told.append((role, kind))  # noqa: E731
        stacks.append(Stack(plan, folder, tell=tell, interrupted=lambda: interrupted, has_ended=lambda _role: over))
        return stacks[-1]

    yield make
    for made in stacks:
        made.stop(hurried=lambda: True)


def _watch_until(stack: Stack, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        stack.watch()
        time.sleep(0.02)


def test_a_process_that_dies_starts_again(stack: Callable[..., Stack], told: list[tuple[str, str]]) -> None:
    running = stack(collector="raise SystemExit(1)", trainer=SLEEP)
    running.start_work()
    _watch_until(running, lambda: told.count(("collector", "start")) == 2)
    assert told[:3] == [("collector", "start"), ("trainer", "start"), ("collector", "died")]


@pytest.mark.parametrize(
    ("limit", "program", "sentence"),
    [
        ("MAX_KILLS", "import os; os.kill(os.getpid(), 9)", "collector was killed by signal 9, 2 times"),
        ("MAX_FAILURES", "print('no luck'); raise SystemExit(4)", r"ended with exit status 4, 2 times(.|\n)*no luck"),
    ],
)
def test_too_many_deaths_end_the_run_with_the_last_lines(
    stack: Callable[..., Stack], monkeypatch: pytest.MonkeyPatch, limit: str, program: str, sentence: str
) -> None:
    monkeypatch.setattr(cli.stack, limit, 1)
    running = stack(collector=program, trainer=SLEEP)
    running.start_work()
    with pytest.raises(ProcessFailed, match=sentence):
        _watch_until(running, lambda: False)


def test_a_collector_that_has_finished_is_left_alone(stack: Callable[..., Stack], told: list[tuple[str, str]]) -> None:
    running = stack(collector="", trainer="import time; time.sleep(1)")
    running.start_work()
    _watch_until(running, lambda: running.is_finished)
    assert told == [("collector", "start"), ("trainer", "start")]


@pytest.mark.parametrize("role", ["collector", "trainer"])
def test_a_calm_end_without_a_reason_is_a_death(
    stack: Callable[..., Stack], told: list[tuple[str, str]], role: str
) -> None:
    running = stack(over=False, **({"collector": SLEEP, "trainer": SLEEP} | {role: ""}))
    running.start_work()
    _watch_until(running, lambda: told.count((role, "start")) == 2)
    assert not running.is_finished


def test_a_trainer_that_failed_has_not_finished(stack: Callable[..., Stack], told: list[tuple[str, str]]) -> None:
    running = stack(collector=SLEEP, trainer="raise SystemExit(1)")
    running.start_work()
    _watch_until(running, lambda: ("trainer", "died") in told)
    assert not running.is_finished


def test_a_service_that_dies_before_it_is_ready_fails_at_once(stack: Callable[..., Stack]) -> None:
    running = stack(judge="print('no such model'); raise SystemExit(1)")
    with pytest.raises(ProcessFailed, match=r"judge .*exit status 1 before it was ready(.|\n)*no such model"):
        running.start_services()


def test_waiting_ends_when_the_person_interrupts(stack: Callable[..., Stack]) -> None:
    began = time.monotonic()
    stack(interrupted=True, judge=SLEEP).start_services()
    assert time.monotonic() - began < 20.0


def test_users_stop_before_what_they_use(stack: Callable[..., Stack], tmp_path: Path) -> None:
    program = """
import signal, sys
def stop(*_):
    open({order!r}, "a").write({role!r} + " ")
    sys.exit(0)
signal.signal(15, stop)
print("up", flush=True)
signal.pause()
"""
    order = tmp_path / "order"
    roles = ("judge", "collector", "trainer")
    running = stack(ready=True, **{role: program.format(order=str(order), role=role) for role in roles})
    running.start_services()
    running.start_work()
    _watch_until(running, lambda: all(RunFolder(tmp_path).log(role).read_text() == "up\n" for role in roles))
    running.stop(timeout_s=30.0)
    assert order.read_text().split()[-1] == "judge"
    assert set(order.read_text().split()) == set(roles)


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    with Ports() as ports:
        port = ports.take(REDIS_HOST, 0)
        server = Child("redis", [find_redis_server(), "-"], log=folder / "log", environ=child_environ())
        server.start(standard_input=server_configuration(folder, port=port, password=PASSWORD))
        try:
            url = redis_url(port, PASSWORD)
            wait_until_it_answers(url, timeout_s=30.0, alive=lambda: server.is_running)
            yield url
        finally:
            server.kill()


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    folder.mkdir()
    with _server(folder) as url, redis.Redis.from_url(url) as client:
        client.xadd("stream", {"id": "1"})
    with _server(folder) as url, redis.Redis.from_url(url) as client:
        assert client.xlen("stream") == 1


def test_nobody_gets_in_without_the_password(tmp_path: Path) -> None:
    with _server(tmp_path) as url:
        assert answers(url)
        without_password = f"redis://{url.rpartition('@')[2]}"
        with pytest.raises(HeadwaterError, match="password"):
            answers(without_password)


def test_a_server_that_died_is_not_waited_for() -> None:
    with pytest.raises(HeadwaterError, match="ended before it answered"):
        wait_until_it_answers("redis://127.0.0.1:1/0", timeout_s=30.0, alive=lambda: False)
