"""Children of the launcher: their logs, their end, and that they never outlive it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.processes import Child, last_lines, stop_children
from tests.cli.launched import is_alive

WAIT_S = 30.0


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    children: list[Child] = []

    def _start(program: str) -> Child:
        log = tmp_path / f"{len(children)}.log"
        child = Child("probe", [sys.executable, "-uc", textwrap.dedent(program)], log=log, environ=os.environ)
        child.start()
        children.append(child)
        return child

    yield _start
    for child in children:
        child.kill()


def test_output_of_both_kinds_lands_in_the_log(start: Callable[[str], Child]) -> None:
    child = start("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    _wait(lambda: child.exit_code == 3)
    assert child.tail() == ["out", "err"]


def test_a_json_line_is_shown_readable(tmp_path: Path) -> None:
    child = Child("probe", ["/bin/true"], log=tmp_path / "log", environ={})
    child.log.write_text('plain\n{"time": "12:00", "level": "error", "message": "disk full"}\n{"other": 1}\n')
    assert child.tail() == ["plain", "12:00 error disk full", '{"other": 1}']


def test_the_tail_of_an_absent_log_is_empty(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "absent", 5) == []


def test_a_calm_child_stops_on_sigterm(start: Callable[[str], Child]) -> None:
    child = start("import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print('up'); signal.pause()")
    _wait(lambda: child.tail() == ["up"])
    assert stop_children([child], timeout_s=WAIT_S) == []
    assert child.exit_code == 0


@pytest.mark.parametrize(("timeout_s", "hurried"), [(0.3, False), (WAIT_S, True)])
def test_a_stubborn_child_is_killed_with_its_own_children(
    start: Callable[[str], Child], timeout_s: float, hurried: bool
) -> None:
    child = start(
        """
        import signal, subprocess, sys
        signal.signal(15, signal.SIG_IGN)
        print(subprocess.Popen(['sleep', '100']).pid)
        signal.pause()
        """
    )
    _wait(lambda: len(child.tail()) == 1)
    grandchild = int(child.tail()[0])
    assert stop_children([child], timeout_s=timeout_s, hurried=lambda: hurried) == ["probe"]
    assert child.exit_code == -signal.SIGKILL
    _wait(lambda: not is_alive(grandchild))


def test_a_child_has_a_session_of_its_own(start: Callable[[str], Child]) -> None:
    child = start("import time; time.sleep(100)")
    assert os.getsid(child.pid) == child.pid


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_children_die_with_a_launcher_that_was_killed(tmp_path: Path) -> None:
    program = f"""
        import os, sys, time
        from pathlib import Path
        from cli.processes import Child
        child = Child('probe', ['/bin/sleep', '100'], log=Path({str(tmp_path / "log")!r}), environ=os.environ)
        child.start()
        print(child.pid, flush=True)
        time.sleep(100)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout:
        pid = int(launcher.stdout.readline())
    time.sleep(0.5)  # the child binds itself before it becomes its command
    assert is_alive(pid)
    launcher.kill()
    launcher.wait(timeout=WAIT_S)
    _wait(lambda: not is_alive(pid))
