"""`torchrun -m trainer` on one, two and three ranks: the same losses, stopped and killed as one."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack
from tests.trainer.test_trainer_process import Process

OPTIONS: dict[str, Any] = {"steps": 6, "pairs_per_step": 8, "checkpoint_every": 2, "stream_timeout_s": 60.0}
"""Three windows of three pairs a step: with two ranks one of them has more to do."""


def torchrun(num_ranks: int) -> tuple[str, ...]:
    standalone = ("-m", "torch.distributed.run", "--standalone", "--shutdown-timeout=60")
    return (sys.executable, *standalone, f"--nproc-per-node={num_ranks}")


def workers(process: Process) -> list[int]:
    """Process ids by rank."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            environ = dict(word.split("=", 1) for word in (entry / "environ").read_text().split("\0") if "=" in word)
        except (OSError, IndexError):
            continue
        if int(stat[1]) == process.popen.pid and "RANK" in environ:
            found[int(environ["RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def assert_as_on_one(stack: Stack, alone: Stack) -> None:
    """Equal to the rounding of fp32 sums in another order."""
    for figures, expected in zip(stack.figures(), alone.figures(), strict=True):
        assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert figures["pairs"] == expected["pairs"]
    torch.testing.assert_close(stack.weights_at(6), alone.weights_at(6), rtol=1e-3, atol=1e-5)
    assert (stack.counts(), stack.stream.window_ids(), stack.contradictions()) == ((18, {}, 0), set(), [])


@pytest.fixture
def alone(make_stack: MakeStack) -> Stack:
    stack = make_stack("alone", **OPTIONS)
    stack.write_plain(range(18))
    stack.train()
    return stack


@pytest.mark.slow
def test_ranks_train_like_one_and_hand_over_to_another_number_of_them(
    make_stack: MakeStack, alone: Stack, tmp_path: Path
) -> None:
    """Two ranks, stopped by a signal to the second one, then three."""
    stack = make_stack("many", **OPTIONS)
    stack.write_plain(range(9))  # three steps, then all wait
    first = Process(stack, tmp_path / "config.toml", torchrun(2))
    first.wait_for_step(3)
    os.kill(workers(first)[1], signal.SIGTERM)
    status, errors = first.end()
    assert (status, "stopped at step 3 of 6" in errors) == (0, True), errors
    assert (stack.checkpoints / "step-00000003/state.json").is_file()
    stack.write_plain(range(9, 18))
    status, errors = Process(stack, tmp_path / "config.toml", torchrun(3)).end()
    assert (status, "finished at step 6 of 6" in errors) == (0, True), errors
    assert_as_on_one(stack, alone)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all_and_nothing_is_lost(
    make_stack: MakeStack, alone: Stack, tmp_path: Path
) -> None:
    stack = make_stack("killed", **OPTIONS)
    stack.write_plain(range(18))
    first = Process(stack, tmp_path / "config.toml", torchrun(2))
    first.wait_for_step(3)
    os.kill(workers(first)[1], signal.SIGKILL)
    status, errors = first.end()
    assert status != 0, errors
    assert stack.contradictions() == []
    stack.train()  # on one, in this process
    assert_as_on_one(stack, alone)


@pytest.mark.slow
def test_a_stop_of_the_launcher_reaches_its_only_trainer(make_stack: MakeStack, tmp_path: Path) -> None:
    """As Kubernetes stops the Job."""
    stack = make_stack(steps=6, checkpoint_every=5)
    stack.write_plain(range(3))
    first = Process(stack, tmp_path / "config.toml", torchrun(1))
    first.wait_for_step(1)
    status, errors = first.end(signal.SIGTERM)
    wait_until(lambda: any(stack.checkpoints.glob("step-*[0-9]")), what="a checkpoint")
    assert "uncaught" not in errors, (status, errors)
