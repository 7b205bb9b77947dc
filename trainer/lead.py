"""Rank 0's side of the loop. It alone reads windows and writes to Redis, database and store; the other ranks follow.

At every step boundary `orders` gives each rank its `Order`. An empty one means that nothing has arrived yet: come back,
so that every rank can be stopped while rank 0 waits for windows.

No method raises HeadwaterError, since the other ranks would wait for ever: the error becomes the next order.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from shared import metrics
from shared.checkpoint_state import CheckpointState, StepFigures, checkpoint_folder
from shared.coordination import TrainerReport, TrainerState
from shared.errors import FencedError, HeadwaterError
from shared.settings import TrainerSettings
from trainer.checkpoint import Checkpoints
from trainer.connections import Connections
from trainer.figures import Telemetry, window_figures
from trainer.inbox import Inbox, TakenWindow
from trainer.layouts.base import Layout, PassPlan
from trainer.losses import Loss
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas
from trainer.throughput import Throughput

_POLL_S = 1.0
"""Longest wait of the other ranks for an order."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What one rank does next."""

    plans: tuple[PassPlan, ...] = ()
    """Its passes of the next step; none: no step yet."""
    num_pairs: int = 0
    """In the whole step, over all ranks."""
    normaliser: int = 1
    """The same, as the loss counts (trainer/losses.py)."""
    publishes: bool = False
    """Offer the weights of the last step to the publisher, which is idle."""
    ends: bool = False
    """No further step: all are done, the source has ended, or a rank was asked to stop."""
    failure: str = ""
    """Rank 0 can't continue. All ranks end with this reason."""
    leaves_checkpoint: bool = False
    """With a `failure`: write a checkpoint of the newest step first."""


@dataclass
class Lead:
    """Put together by trainer/assembly.py."""

    settings: TrainerSettings
    num_ranks: int
    loss: Loss
    layout: Layout
    inbox: Inbox
    publisher: WeightPublisher
    replicas: Replicas
    checkpoints: Checkpoints
    connections: Connections
    telemetry: Telemetry
    throughput: Throughput
    last: CheckpointState | None
    """The newest checkpoint; None before the first."""
    error: HeadwaterError | None = field(default=None, init=False)
    """Why rank 0 can't continue."""
    taken: list[TakenWindow] = field(default_factory=list, init=False)
    """The windows of the step in hand."""
    unwritten: dict[str, float] | None = field(default=None, init=False)
    """Figures of the newest step until the database has its row."""

    def orders(self, step: int, *, stop: bool) -> list[Order]:
        """By rank. `step` updates are applied."""
        found: list[Order] = []
        self._attempt(lambda: found.extend(self._orders(step, stop=stop)))
        if self.error is not None:
            failure = Order(failure=str(self.error) or repr(self.error), leaves_checkpoint=self._may_checkpoint())
            return [failure] * self.num_ranks
        return found

    def _attempt(self, work: Callable[[], None]) -> None:
        if self.error is None:
            try:
                work()
            except HeadwaterError as exc:
                self.error = exc

    def _may_checkpoint(self) -> bool:
        """Not without the lease, and not after one that did not reach the disk: its windows would be in none."""
        if isinstance(self.error, FencedError):
            return False
        with suppress(HeadwaterError):  # one error is enough to end by
            self.checkpoints.wait()
        return self.last is None or checkpoint_folder(self.checkpoints.root, self.last.step).exists()

    def _orders(self, step: int, *, stop: bool) -> list[Order]:
        self.connections.lease.raise_if_lost()
        if self.checkpoints.failed:
            self.checkpoints.wait()
        spending = self.telemetry.tally.spending
        if stop or step >= self.settings.steps:
            return [Order(ends=True)] * self.num_ranks
        if self.publisher.is_due(step):
            return [Order(publishes=True)] * self.num_ranks
        with spending("wait_replicas"):
            self.replicas.keep_up(step)
        with spending("wait_windows"):
            taken = self.inbox.take(step + 1, timeout_s=_POLL_S)
        if not taken:
            return [Order(ends=taken is not None)] * self.num_ranks
        self.taken = taken
        return self._divided(taken)

    def _divided(self, taken: list[TakenWindow]) -> list[Order]:
        windows = [window.pairs for window in taken]
        pairs = [pair for window in windows for pair in window]
        plans = self.layout.plan(windows, max_tokens=self.settings.max_batch_tokens, num_ranks=self.num_ranks)
        return [Order(tuple(own), len(pairs), self.loss.normaliser(pairs)) for own in plans]

    def applied(self, step: int, figures: Mapping[str, float], work: Tensor, *, computing_s: float) -> None:
        """Update `step` contains the windows in hand: write its row and report it. `work`: of all ranks
        (throughput.py)."""
        self.inbox.mark_applied(self.taken, step)
        pairs = [pair for window in self.taken for pair in window.pairs]
        speed = self.throughput.figures(work, pairs, computing_s=computing_s)
        self.unwritten = {**figures, **speed, **window_figures(self.taken), **self.telemetry.drain()}
        self._attempt(lambda: self._write(step))

    def _write(self, step: int) -> None:
        assert self.unwritten is not None
        self.telemetry.write(step, self.publisher.version, self.unwritten)
        self.unwritten = None
        self.report(step, "training")

    def skipped(self, what: str, *, step: int) -> None:
        """The windows in hand are used up without an update: they are dropped."""
        self.telemetry.tally.counts["skipped_steps"] += 1
        metrics.skipped_steps_total.inc()
        windows = [window.window_id for window in self.taken]
        record = self.connections.run.record_event
        self._attempt(lambda: record("trainer", "skipped_step", what, step=step, windows=windows))
        self._attempt(lambda: self.inbox.drop_skipped(self.taken))  # after the event, which is the audit's evidence

    def report(self, step: int, state: TrainerState) -> None:
        self.connections.coordination.report_trainer(TrainerReport(step, self.publisher.version, state))

    def next_state(self, step: int, *, reference_step: int) -> CheckpointState:
        """What the checkpoint of `step` contains: all windows applied since the one before."""
        self.last = CheckpointState(
            step=step,
            weight_version=self.publisher.version,
            reference_step=reference_step,
            finished=self.inbox.finished(),
            number=self.last.number + 1 if self.last else 1,
            after=self.last.step if self.last else 0,
            row=self._owed_row(),
        )
        return self.last

    def _owed_row(self) -> StepFigures | None:
        if self.unwritten is None:
            return None
        return StepFigures(at=time.time(), weight_version=self.publisher.version, figures=self.unwritten)

    def settle(self, state: CheckpointState) -> None:
        """Called by the checkpoint's thread when it is on disk: ledger, acknowledgement, older ones deleted."""
        self.inbox.commit(state.finished)
        self.checkpoints.prune()
        _log.info("checkpoint of step %d: %d windows finished", state.step, len(state.finished))

    def conclude(self, step: int, *, stopped: bool) -> TrainerState:
        """The run's state at the end of this process."""
        source_ended = step < self.settings.steps
        if source_ended and stopped:
            _log.info("stopped at step %d of %d", step, self.settings.steps)
            return "training"
        message = f"{'the source ended' if source_ended else 'finished'} at step {step} of {self.settings.steps}"
        _log.info(message)
        self.connections.run.record_event("trainer", "finished", message, step=step, source_ended=source_ended)
        self.report(step, "finished")
        return "finished"
