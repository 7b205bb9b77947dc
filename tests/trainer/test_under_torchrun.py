"""`torchrun -m trainer`, as the Kubernetes Job starts it: stopped calmly."""

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
    stack.write_plain(range(3))  # 9 pairs: two steps, then it waits
    first = Process(stack, tmp_path / "config.toml", launcher)
    first.wait_for_step(2)
    _, errors = first.end(signal.SIGTERM)
    assert [folder.name for folder in stack.checkpoints.glob("step-*")] == ["step-00000002"], errors
    stack.write_plain(range(3, 8))
    status, errors = Process(stack, tmp_path / "config.toml", launcher).end()
    assert (status, "finished" in errors) == (0, True), errors
    assert (stack.checkpoints / "step-00000006/state.json").is_file()
