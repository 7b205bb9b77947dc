"""A child process of the launcher: it logs to a file and is stopped by its pid.

It runs in its own session, so a terminal's Ctrl-C does not reach it and the launcher decides the order of stopping. It
does not outlive a launcher that was killed (bound.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_BOUND = Path(__file__).with_name("bound.py")
_TAIL_BYTES = 64_000


class Child:
    """A process that can be restarted."""

    def __init__(self, role: str, command: Sequence[str], *, log: Path, environ: Mapping[str, str]) -> None:
        self.role = role
        self.log = log
        self._command = list(command)
        self._environ = dict(environ)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, standard_input: bytes = b"") -> None:
        """`command[0]` must be an absolute path."""
        wrapped = [sys.executable, "-I", "-S", str(_BOUND), str(os.getpid()), *self._command]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                wrapped, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._environ,
                start_new_session=True,
            )  # fmt: skip
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(standard_input)
            self._process.stdin.close()
        except BrokenPipeError:
            return  # it died at once; its log says why

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.role} was never started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -n when signal n killed it."""
        return self._process.poll() if self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        if self.is_running:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its process group, then reap it."""
        if self._process is None or not self.is_running:
            return
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def tail(self, *, lines: int = 12) -> list[str]:
        """Its last log lines, readable."""
        return [readable(line) for line in last_lines(self.log, lines)]


def stop_children(
    children: Sequence[Child], *, timeout_s: float, hurried: Callable[[], bool] = lambda: False
) -> list[str]:
    """SIGTERM to all; SIGKILL to those left after `timeout_s`, or once `hurried()`. Returns the killed roles."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + timeout_s
    while any(child.is_running for child in children) and time.monotonic() < deadline and not hurried():
        time.sleep(0.05)
    stubborn = [child for child in children if child.is_running]
    for child in stubborn:
        child.kill()
    return [child.role for child in stubborn]


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; empty when there is no such file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return text.splitlines()[-count:]


def readable(line: str) -> str:
    """A JSON log line as `time level message`; any other line unchanged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    if not isinstance(entry, dict) or "message" not in entry:
        return line
    text = f"{entry.get('time', '')} {entry.get('level', '')} {entry['message']}"
    return f"{text}\n{entry['traceback']}" if entry.get("traceback") else text
