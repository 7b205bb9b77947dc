"""`torchrun -m trainer`, as the Kubernetes Job starts it: one process, stopped calmly, never two."""

import signal
import sys
from pathlib import Path

import pytest

from tests.trainer.conftest import MakeStack
from tests.trainer.test_trainer_process import Process

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--shutdown-timeout=60")


@pytest.mark.slow
def test_a_stop_reaches_the_trainer_which_writes_a_checkpoint_and_resumes(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    stack, launcher = make_stack(steps=6, checkpoint_every=5), (*TORCHRUN, "--nproc-per-node=1")
    stack.write_plain(range(5))  # two make a step: two steps, then it waits
    first = Process(stack, tmp_path / "config.toml", launcher)
    first.wait_for_step(2)
    _, errors = first.end(signal.SIGTERM)
    assert [folder.name for folder in stack.checkpoints.glob("step-*")] == ["step-00000002"], errors
    stack.write_plain(range(5, 12))
    status, errors = Process(stack, tmp_path / "config.toml", launcher).end()
    assert (status, "finished" in errors) == (0, True), errors
    assert (stack.checkpoints / "step-00000006/state.json").is_file()


@pytest.mark.slow
def test_two_processes_are_refused_before_either_reads_the_stream(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack(steps=2)
    stack.write_plain(range(4))
    status, errors = Process(stack, tmp_path / "config.toml", (*TORCHRUN, "--nproc-per-node=2")).end()
    assert status == 1
    assert "torchrun started 2 trainer processes, but the trainer is one process on one device" in errors
    assert (stack.stream.backlog().unread, stack.coordination.trainer_report()) == (4, None)
