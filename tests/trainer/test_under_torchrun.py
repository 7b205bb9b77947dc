"""`torchrun -m trainer`, as the Kubernetes Job starts it: one process, stopped calmly, never two."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.configuration import write_settings
from tests.trainer.conftest import Stack
from tests.trainer.windows import plain_window

MakeStack = Callable[..., Stack]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--shutdown-timeout=60")
WAIT_S = 120.0


def launch(stack: Stack, config: Path, *, num_processes: int = 1) -> subprocess.Popen[str]:
    write_settings(stack.settings, config)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    command = [*TORCHRUN, f"--nproc-per-node={num_processes}", "-m", "trainer", "--config", str(config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(stack: Stack, step: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until and process.poll() is None:
        report = stack.coordination.trainer_report()
        if report is not None and report.step >= step:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"no step {step}:\n{process.communicate(timeout=10)[1]}")


def checkpoints(stack: Stack) -> list[str]:
    return sorted(folder.name for folder in (stack.settings.run.folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_stop_reaches_the_trainer_which_writes_a_checkpoint_and_resumes(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    stack = make_stack(steps=6, pairs_per_step=4, checkpoint_every=5, stream_timeout_s=60.0)
    stack.write(plain_window(number, run=stack.run) for number in range(3))  # 9 pairs: two steps, then it waits
    first = launch(stack, tmp_path / "config.toml")
    wait_for_step(stack, 2, first)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=WAIT_S)
    assert checkpoints(stack) == ["step-00000002"], errors

    stack.write(plain_window(number, run=stack.run) for number in range(3, 8))
    second = launch(stack, tmp_path / "config.toml")
    _, errors = second.communicate(timeout=WAIT_S)
    assert (second.returncode, "finished" in errors) == (0, True), errors
    assert checkpoints(stack)[-1] == "step-00000006"


@pytest.mark.slow
def test_two_processes_are_refused_before_either_reads_the_stream(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack(steps=2, pairs_per_step=4)
    stack.write(plain_window(number, run=stack.run) for number in range(4))
    process = launch(stack, tmp_path / "config.toml", num_processes=2)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "torchrun started 2 trainer processes, but the trainer is one process on one device" in errors
    assert (stack.stream.backlog().unread, stack.coordination.trainer_report()) == (4, None)
