"""The trainer's lease: one holder, renewed over outages, and nothing that a replaced trainer writes lands."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any
from unittest.mock import patch

import pytest

from shared.checkpoint_state import EvidenceFile, StepFigures
from shared.coordination import Coordination, TrainerReport
from shared.database import EventRow, PartRow, StepRow, WeightVersionRow, WindowRow
from shared.errors import FencedError
from shared.ledger import Ledger
from shared.records import TRAINER_PART, WindowKey
from shared.redis import lease_key
from shared.retries import Retries
from shared.runs import Run
from shared.stream import WindowStream
from shared.weights.store import WeightStore
from tests.services.collector.processes import RedisProcess
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack, build_stack
from trainer import checkpoint
from trainer.checkpoint import Checkpoints
from trainer.connections import Connections
from trainer.lead import Order
from trainer.lease import TrainerLease
from trainer.loop import Trainer

TAKEN = "another trainer has taken over the run after lease number 1"


def open_connections(stack: Stack, stop: Event | None = None) -> Connections:
    opened = Connections.open(stack.settings, Retries(stop=stop or Event()))
    assert opened is not None
    return opened


def replace_holder(stack: Stack) -> TrainerLease:
    """What happens to a trainer that is frozen: its key ends, and another trainer takes the run."""
    stack.client.delete(lease_key(stack.run, TRAINER_PART))
    taken = TrainerLease.take(stack.coordination, stack.ledger, Retries(), lease_s=60)
    assert taken is not None
    return taken


def test_the_second_waits_until_the_first_ends_and_has_the_next_number(make_stack: MakeStack) -> None:
    stack = make_stack()
    first = open_connections(stack)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(open_connections, stack)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.5)
        assert stack.coordination.lease_owner(TRAINER_PART) == first.lease.lease.owner
        first.close()
        second = waiting.result(timeout=30)
    assert (first.lease.lease.epoch, second.lease.lease.epoch) == (1, 2)
    assert [(row.part, row.lease_epoch) for row in stack.rows(PartRow)] == [(TRAINER_PART, 2)]
    second.close()
    assert stack.coordination.lease_owner(TRAINER_PART) is None


def test_who_waits_says_for_whom_once_and_ends_when_asked_to_stop(
    make_stack: MakeStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack, stop = make_stack(lease_s=0.3), Event()
    first = open_connections(stack)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(Connections.open, stack.settings, Retries(stop=stop))
        with pytest.raises(TimeoutError):
            waiting.result(timeout=1)
        stop.set()
        assert waiting.result(timeout=30) is None
    said = [message for message in caplog.messages if "waiting for the trainer" in message]
    assert (len(said), first.lease.lease.owner in said[0]) == (1, True)
    first.lease.raise_if_lost()
    first.close()


def test_a_holder_that_falls_silent_is_replaced_and_notices(make_stack: MakeStack) -> None:
    stack = make_stack(lease_s=0.3)
    first = open_connections(stack)
    second = replace_holder(stack)
    assert first.lease.lost.wait(30)
    with pytest.raises(FencedError, match=TAKEN):
        first.lease.raise_if_lost()
    first.close()
    assert stack.coordination.lease_owner(TRAINER_PART) == second.lease.owner
    second.release()


def test_an_outage_of_redis_longer_than_the_lease_costs_nothing_if_nobody_took_it(
    policy_folder: Path, tmp_path: Path
) -> None:
    own_redis = RedisProcess(tmp_path)
    own_redis.start()
    stack = build_stack(tmp_path, policy_folder, own_redis.url, lease_s=0.3)
    held = open_connections(stack)
    own_redis.stop()
    held.lease.confirm()  # the database can say
    time.sleep(0.5)
    own_redis.start()
    stack.client.delete(lease_key(stack.run, TRAINER_PART))  # it ended meanwhile
    wait_until(lambda: stack.coordination.lease_owner(TRAINER_PART) == held.lease.lease.owner, what="a renewal")
    held.lease.raise_if_lost()
    held.coordination.announce_weights(3)
    held.close()
    own_redis.stop()


def test_nothing_that_a_replaced_trainer_writes_lands(make_stack: MakeStack) -> None:
    stack = make_stack()
    stack.write_plain(range(2))
    stale = open_connections(stack)
    (entry,) = [stale.deliveries.next()]
    assert entry is not None
    new = replace_holder(stack)
    before = (stack.rows(WindowRow)[0].state, stack.stream.backlog(), stack.stream.window_ids())
    figures = StepFigures(at=1.0, weight_version=0, figures={})
    version: dict[str, Any] = {"step": 0, "form": "full", "num_bytes": 1, "seconds": 0.1, "created_at": 1.0}
    writes: list[Callable[[], Any]] = [
        lambda: stale.ledger.mark_trained({entry.window_id: 1}),
        lambda: stale.ledger.drop(WindowKey.parse(entry.window_id), reason="stale"),
        lambda: stale.run.record_step(1, figures),
        lambda: stale.run.record_version(0, **version),
        lambda: stale.run.record_event("trainer", "started", "late"),
        lambda: stale.run.delete_steps_beyond(0),
        lambda: stale.stream.acknowledge({entry.entry_id: entry.window_id}),
        lambda: stale.stream.read(count=1, block_s=0.1),
        lambda: list(stale.stream.read_pending()),
        lambda: stale.coordination.announce_weights(5),
        lambda: stale.coordination.report_trainer(TrainerReport(1, 1, "training")),
        stale.lease.confirm,
    ]
    for write in writes:
        with pytest.raises(FencedError, match=TAKEN):
            write()
    assert (stack.rows(WindowRow)[0].state, stack.stream.backlog(), stack.stream.window_ids()) == before
    assert [stack.rows(table) for table in (StepRow, WeightVersionRow, EventRow)] == [[], [], []]
    assert (stack.coordination.announced_version(), stack.coordination.trainer_report()) == (None, None)
    stale.close()
    new.release()


@dataclass
class Frozen:
    """`happen` comes before the first call of `owner.name` after step 2, in whatever thread that is. The loop does not
    go on from step 2 before, and then sees what the threads have met."""

    trainer: Trainer
    owner: Any
    name: str
    happen: Callable[[], None]
    _began: Lock = field(default_factory=Lock)
    _happened: Event = field(default_factory=Event)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        original, next_order = getattr(self.owner, self.name), self.trainer.next_order

        def call(*arguments: Any, **options: Any) -> Any:
            if self.trainer.step == 2 and self._began.acquire(blocking=False):
                try:
                    self.happen()
                finally:
                    self._happened.set()
            return original(*arguments, **options)

        def held() -> Order:
            if self.trainer.step < 2:
                self.trainer.publisher.wait()  # else step 2 begins while an earlier version is written
            if self.trainer.publisher.offered_step == 2:  # and the checkpoint is begun before
                assert self._happened.wait(60), f"{self.name} was not called"
                wait_until(self._threads_have_ended, what="the threads")
            return next_order()

        with patch.object(self.owner, self.name, call), patch.object(self.trainer, "next_order", held):
            yield

    def _threads_have_ended(self) -> bool:
        job = self.trainer.publisher._job
        writes = any(thread.name == "checkpoint" for thread in threading.enumerate())
        return not writes and (job is None or job.done())


PLACES: dict[str, tuple[Any, str]] = {
    "before the row of a step": (Run, "record_step"),
    "before the files of a version": (WeightStore, "begin"),
    "between its files and its manifest": (WeightStore, "_create_manifest"),
    "between a manifest and its row": (Run, "record_version"),
    "before the announcement": (Coordination, "announce_weights"),
    "before the folder of a checkpoint": (Checkpoints, "_make_folder"),
    "before its files": (Checkpoints, "_write_parts"),
    "between its files and the rename": (checkpoint, "_sync"),
    "right before the rename": (Path, "rename"),
    "before the evidence": (Checkpoints, "keep_evidence"),
    "right before its line": (EvidenceFile, "append"),
    "before the ledger": (Ledger, "mark_trained"),
    "before the acknowledgement": (WindowStream, "acknowledge"),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_trainer_is_replaced_the_new_one_ends_the_run_and_all_balances(
    make_stack: MakeStack, place: str
) -> None:
    """The new trainer runs to the end of the run while the old one is frozen there."""
    stack = make_stack(steps=4, pairs_per_step=3, checkpoint_every=2)
    stack.write_plain(range(4))
    stale = stack.prepare()
    owner, name = PLACES[place]

    def be_replaced() -> None:
        stack.client.delete(lease_key(stack.run, TRAINER_PART))
        stack.trainers.clear()
        stack.train()
        frozen.append(state_of(stack))

    frozen: list[Any] = []
    with Frozen(stale, owner, name, be_replaced)(), pytest.raises(FencedError, match=TAKEN):
        stale.run()
    stale.close()
    for before, after in zip(frozen[0], state_of(stack), strict=True):
        assert before == after
    assert len(frozen) == 1
    assert (stack.report()[0], stack.report()[2], stack.counts()) == (4, "finished", (4, {}, 0))
    assert (stack.contradictions(), stack.stream.window_ids()) == ([], set())
    assert not list(stack.checkpoints.glob("*.tmp"))


def state_of(stack: Stack) -> Any:
    """All that a replaced trainer could have changed."""
    store = WeightStore(stack.settings.weight_store_url)
    manifests = [store.manifest(version) for version in store.versions()]
    rows = [
        [(row.step, row.weight_version, row.at) for row in stack.rows(StepRow)],
        [(row.position, row.state, row.trained_step, row.finished_at) for row in stack.rows(WindowRow)],
        [(row.version, row.created_at) for row in stack.rows(WeightVersionRow)],
        len(stack.rows(EventRow)),
    ]
    checkpoints = sorted((path.name, path.stat().st_mtime_ns) for path in stack.checkpoints.iterdir())
    announced = (stack.coordination.announced_weights(), stack.report(), stack.stream.backlog())
    return manifests, rows, checkpoints, announced


def test_a_run_whose_steps_are_done_frees_the_lease(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1)
    stack.write_plain(range(2))
    stack.train()
    stack.train()
    assert stack.coordination.lease_owner(TRAINER_PART) is None
