"""`python -m trainer` as a process: killed, stopped, misconfigured."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared.configuration import write_settings
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack, assert_equal_weights
from tests.trainer.windows import plain_window

OPTIONS = {"steps": 12, "pairs_per_step": 4, "checkpoint_every": 3, "stream_timeout_s": 60.0, "lease_s": 2.0}


class Process:
    """`python -m trainer`, or the same under another launcher; killed at the end whatever happens."""

    def __init__(self, stack: Stack, config: Path, launcher: Sequence[str] = (sys.executable,)) -> None:
        write_settings(stack.settings, config)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
        command = [*launcher, "-m", "trainer", "--config", str(config)]
        self.stack = stack
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + 90
        while time.monotonic() < until and self.popen.poll() is None:
            if self.stack.coordination.trainer_report() and self.stack.report()[0] >= step:
                return
            time.sleep(0.02)
        self.popen.kill()
        raise AssertionError(self.popen.communicate(timeout=10)[1].decode())

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Exit status and standard error, after signal `number` if given."""
        if number is not None:
            self.popen.send_signal(number)
        try:
            _, errors = self.popen.communicate(timeout=90)
        finally:
            self.popen.kill()
        return self.popen.returncode, errors.decode()


@pytest.mark.slow
def test_kills_and_stops_leave_the_bits_of_an_uninterrupted_run(make_stack: MakeStack, tmp_path: Path) -> None:
    """Equal weights in the end mean that every window was trained exactly once and in its order."""
    whole, broken = make_stack("whole", **OPTIONS), make_stack("broken", **OPTIONS)
    windows = [plain_window(number, run=broken.run) for number in range(24)]  # two make a step
    config = tmp_path / "config.toml"

    broken.write(windows[:9])  # steps 1 to 4, then it waits with one window in hand
    first = Process(broken, config)
    first.wait_for_step(4)
    wait_until(lambda: broken.stream.backlog().pending == 3, what="the checkpoint of step 3")  # written beside step 4
    assert first.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert broken.counts()[0] == 6

    broken.write(windows[9:15])
    second = Process(broken, config)
    second.wait_for_step(5)
    assert second.end(signal.SIGTERM)[0] == 0

    broken.write(windows[15:])
    status, errors = Process(broken, config).end()
    assert (status, "finished" in errors) == (0, True), errors

    whole.write(window.model_copy(update={"run_id": whole.run}) for window in windows)
    whole.train()
    assert_equal_weights(whole.weights_at(12), broken.weights_at(12))
    assert (broken.counts(), broken.stream.window_ids(), broken.contradictions()) == ((24, {}, 0), set(), [])


@pytest.mark.parametrize("given", ["--trainer.stepz", "--redis.url"])
def test_wrong_settings_are_one_error_line_and_status_1(given: str) -> None:
    command = [sys.executable, "-m", "trainer", given, ""]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    entry = json.loads(answer.stderr)  # exactly one line
    assert (answer.returncode, entry["level"]) == (1, "error")
    assert given.removeprefix("--") in entry["message"]


def test_help_does_not_load_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "torch" not in answer.stderr
