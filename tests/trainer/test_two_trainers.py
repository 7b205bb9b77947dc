"""Two trainer processes on one run: the second waits, takes over, and what the first does afterwards does not land."""

import signal
import time
import urllib.request
from pathlib import Path
from threading import Timer

import pytest

from shared.database import StepRow
from shared.records import TRAINER_PART
from shared.weights.store import WeightStore
from tests.services.collector.processes import free_port
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack
from tests.trainer.test_lease import state_of
from tests.trainer.test_trainer_process import Process


def holder(stack: Stack) -> int | None:
    """Process id of the trainer that has the lease."""
    owner = stack.coordination.lease_owner(TRAINER_PART)
    return int(owner.split(":")[1]) if owner else None


def wait_for_holder(stack: Stack, process: Process) -> None:
    wait_until(lambda: holder(stack) == process.popen.pid, what="the lease", timeout_s=90)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_waiting_trainer_takes_over_after_a_stop_and_after_a_kill(make_stack: MakeStack, tmp_path: Path) -> None:
    """It answers /healthz meanwhile, and a stop while it waits is no error."""
    stack = make_stack(steps=4, pairs_per_step=3, checkpoint_every=2, lease_s=60.0)
    stack.write_plain([0])
    first = Process(stack, tmp_path / "first.toml")
    first.wait_for_step(1)
    port = free_port()
    second = Process(stack.with_settings("trainer", metrics_port=port), tmp_path / "second.toml")
    wait_until(lambda: is_healthy(port), what="/healthz of a trainer that waits", timeout_s=90)
    assert first.end(signal.SIGTERM)[0] == 0
    wait_for_holder(stack, second)  # long before 60 s: a stop releases the lease
    stack.write_plain([1])
    second.wait_for_step(2)

    third, fourth = (Process(stack, tmp_path / f"{name}.toml") for name in ("third", "fourth"))
    wait_until_it_waits(fourth)
    assert fourth.end(signal.SIGTERM)[0] == 0
    assert second.end(signal.SIGKILL)[0] == -signal.SIGKILL
    stack.client.pexpire(f"headwater:{stack.run}:lease:{TRAINER_PART}", 500)  # spares the test a minute
    wait_for_holder(stack, third)
    stack.write_plain([2, 3])
    status, errors = third.end()
    assert (status, "finished" in errors) == (0, True), errors
    assert (stack.counts(), stack.contradictions()) == ((4, {}, 0), [])


def is_published(stack: Stack, step: int) -> bool:
    """And older versions are deleted, which comes last."""
    return is_announced(stack, step) and len(store_of(stack).versions()) == stack.settings.weights.keep_versions


def is_announced(stack: Stack, step: int) -> bool:
    store = store_of(stack)
    *_, newest = store.versions()
    return (store.manifest(newest).step, stack.coordination.announced_version()) == (step, newest)


def store_of(stack: Stack) -> WeightStore:
    return WeightStore(stack.settings.weight_store_url)


def wait_until_it_waits(process: Process) -> None:
    assert process.popen.stderr is not None
    end = Timer(90, process.popen.kill)
    end.start()
    assert any(b"waiting for the trainer" in line for line in process.popen.stderr), "it ended"
    end.cancel()


@pytest.mark.slow
def test_a_trainer_that_is_frozen_and_replaced_writes_nothing_when_it_wakes(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    stack = make_stack(steps=6, pairs_per_step=3, checkpoint_every=4, lease_s=1.0)
    stack.write_plain(range(2))
    first = Process(stack, tmp_path / "first.toml")
    first.wait_for_step(2)
    wait_until(lambda: is_announced(stack, 2), what="the weights after step 2")
    time.sleep(0.5)  # now it only waits: frozen in a transaction it would keep SQLite locked
    first.popen.send_signal(signal.SIGSTOP)
    stack.write_plain(range(2, 4))
    second = Process(stack, tmp_path / "second.toml")
    second.wait_for_step(4)
    wait_until(lambda: stack.stream.backlog().pending == 0, what="the checkpoint of step 4")
    wait_until(lambda: is_published(stack, 4), what="the weights after step 4")
    before = state_of(stack)
    first.popen.send_signal(signal.SIGCONT)
    status, errors = first.end()
    assert (status, "another trainer has taken over the run after lease number 1" in errors) == (1, True), errors
    assert state_of(stack) == before
    stack.write_plain(range(4, 6))
    status, errors = second.end()
    assert (status, "finished" in errors) == (0, True), errors
    assert [row.step for row in stack.rows(StepRow)] == [1, 2, 3, 4, 5, 6]
    assert (stack.counts(), stack.contradictions(), stack.stream.window_ids()) == ((6, {}, 0), [], set())
