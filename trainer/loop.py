"""The training loop: `Trainer.run`, one step on one screen (`Trainer.take_step`).

    fill the inbox -> take pairs -> passes -> loss, backward -> clip -> step -> publish -> row
                                                    every checkpoint_every steps: checkpoint -> acknowledge

The loop blocks in `inbox.fill` until a collector writes, in `replicas.keep_up` if the settings say so, and in calls
that wait out an outage of Redis or the database. SIGTERM sets `stop`: the step in hand is finished, a checkpoint is
written, `run` returns. If an outage lasts too long, a checkpoint is written and its error raised.
"""

import logging
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared import metrics
from shared.checkpoint_state import CheckpointState, StepFigures
from shared.coordination import TrainerReport, TrainerState
from shared.errors import DatabaseError, StreamError, TrainingError, WeightStoreError
from shared.settings import TrainerSettings
from trainer.checkpoint import Checkpoints
from trainer.connections import Connections
from trainer.figures import Telemetry, pair_figures
from trainer.inbox import Inbox
from trainer.layouts.base import Layout, WindowPairs
from trainer.log_probs import SuffixLogProbs
from trainer.losses import Loss
from trainer.policy import Policy, PolicyOptimizer
from trainer.preferences import Preference
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Put together by trainer/assembly.py."""

    settings: TrainerSettings
    policy: Policy
    optimizer: PolicyOptimizer
    loss: Loss
    inbox: Inbox
    publisher: WeightPublisher
    replicas: Replicas
    checkpoints: Checkpoints
    connections: Connections
    telemetry: Telemetry
    layout: Layout
    last: CheckpointState | None
    """The newest checkpoint; None before the first."""
    step: int = field(init=False)
    """Updates applied."""
    bad_steps: int = field(default=0, init=False)
    """Skipped steps in a row."""
    unwritten: dict[str, float] | None = field(default=None, init=False)
    """Figures of the newest step until the database has its row."""

    def __post_init__(self) -> None:
        self.step = self.checkpointed_step

    @property
    def checkpointed_step(self) -> int:
        return self.last.step if self.last else 0

    def run(self) -> TrainerState:
        """Train until `settings.steps`, the end of the source, or `stop`. Raises the error of Redis, database or weight
        store if that stays away. Always leaves a checkpoint of the newest step on disk."""
        if self.connections.stop.is_set():
            return "training"
        try:
            return self._train()
        except (StreamError, DatabaseError, WeightStoreError):
            try:
                self._write_checkpoint()  # the next start writes what it owes to ledger and stream
            except TrainingError as exc:
                _log.error("no checkpoint of step %d on the way out: %s", self.step, exc)
            raise

    def _train(self) -> TrainerState:
        self._publish()  # before the first step: a broken weight path shows at once
        self._report("training")
        while self.step < self.settings.steps:
            pairs = self.next_pairs()
            if not pairs:
                break
            self.take_step(pairs)
            if self.step % self.settings.checkpoint_every == 0:
                self.checkpoint()
        self.checkpoint()
        return self._conclude()

    def next_pairs(self) -> list[Preference]:
        """Exactly `pairs_per_step`; fewer at the end of the source; none means stop."""
        with self.telemetry.tally.spending("wait"):
            self.inbox.fill(self.settings.pairs_per_step, weight_version=self.publisher.version)
        return [] if self.connections.stop.is_set() else self.inbox.take(self.settings.pairs_per_step)

    def take_step(self, pairs: list[Preference]) -> None:
        """One optimizer step on exactly these pairs, or a skipped one if loss or gradient are not finite."""
        step, tally = self.step + 1, self.telemetry.tally
        with tally.spending("forward_backward"):
            figures = self._accumulate_gradients(pairs)
        with tally.spending("optimizer"):
            figures["grad_norm"] = float(self.optimizer.clip())
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])):
                return self._skip(step, figures, num_pairs=len(pairs))
            figures["learning_rate"] = self.optimizer.step(step)
        self.step, self.bad_steps = step, 0
        self.inbox.mark_applied(pairs, step)
        self.unwritten = figures | pair_figures(pairs, weight_version=self.publisher.version)
        every = self.settings.refresh_reference_every
        if every and step % every == 0:
            self.policy.refresh_reference(step)
        if step % self.publisher.settings.push_every == 0:
            self._publish()
        self.unwritten |= tally.drain()
        self.telemetry.write(step, self.publisher.version, self.unwritten)
        self.unwritten = None
        return self._report("training")

    def _accumulate_gradients(self, pairs: list[Preference]) -> dict[str, float]:
        """Backward over all passes; returns the loss and the mean figures of the step."""
        self.optimizer.zero_grad()
        normaliser = self.loss.normaliser(pairs)
        sums: dict[str, Tensor] = {}
        num_batch_tokens = 0
        (plans,) = self.layout.plan(_by_window(pairs), max_tokens=self.settings.max_batch_tokens)
        for plan in plans:
            batch = self.layout.lay_out(plan, device=self.policy.model.device)
            reference = None
            if self.policy.reference is not None:
                with torch.no_grad():
                    reference = SuffixLogProbs(self.policy.reference)(batch)
            terms = self.loss.terms(SuffixLogProbs(self.policy.model)(batch), reference)
            (terms.loss_sum / normaliser).backward()  # type: ignore[no-untyped-call]
            for name, value in (terms.figures | {"loss": terms.loss_sum.detach()}).items():
                sums[name] = sums[name] + value if name in sums else value
            num_batch_tokens += batch.num_tokens
        figures = {name: float(value) / len(pairs) for name, value in sums.items()}
        figures["loss"] = float(sums["loss"]) / normaliser
        return figures | {"batch_tokens": num_batch_tokens}

    def _skip(self, step: int, figures: dict[str, float], *, num_pairs: int) -> None:
        """Nothing is applied; the pairs are used up. Raises TrainingError after `max_bad_steps` in a row."""
        self.bad_steps += 1
        self.optimizer.zero_grad()
        self.telemetry.tally.counts["skipped_steps"] += 1
        metrics.skipped_steps_total.inc()
        what = f"step {step} skipped: loss {figures['loss']}, gradient norm {figures['grad_norm']}"
        _log.error("%s (%d in a row)", what, self.bad_steps)
        self.connections.run.record_event("trainer", "skipped_step", what, step=step, pairs=num_pairs)
        if self.bad_steps >= self.settings.max_bad_steps:
            raise TrainingError(
                f"{self.bad_steps} steps in a row without a finite loss (trainer.max_bad_steps), the last: {what}; "
                f"the checkpoint of step {self.checkpointed_step} is intact: lower learning_rate and start again"
            )

    def _publish(self) -> None:
        with self.telemetry.tally.spending("push"):
            self.publisher.publish(self.policy.model, self.step)
        with self.telemetry.tally.spending("replicas"):
            self.replicas.keep_up(self.publisher.version)

    def _report(self, state: TrainerState) -> None:
        self.connections.coordination.report_trainer(TrainerReport(self.step, self.publisher.version, state))

    def checkpoint(self) -> None:
        """In this order: checkpoint and evidence on disk, ledger, acknowledgement, older ones deleted."""
        with self.telemetry.tally.spending("checkpoint"):
            if state := self._write_checkpoint():
                self.inbox.commit(state.finished)
                self.checkpoints.prune()

    def _write_checkpoint(self) -> CheckpointState | None:
        """None if this step has one. Needs neither Redis nor the database. Raises TrainingError."""
        if self.checkpointed_step == self.step:
            return None
        state = CheckpointState(
            step=self.step,
            weight_version=self.publisher.version,
            reference_step=self.policy.reference_step,
            finished=self.inbox.finished(),
            partial=self.inbox.partial(),
            number=self.last.number + 1 if self.last else 1,
            after=self.checkpointed_step,
            row=self._owed_row(),
        )
        folder = self.checkpoints.write(state, self.policy, self.optimizer)
        self.last = state
        self.checkpoints.keep_evidence(state)
        _log.info("checkpoint %s: %d windows finished", folder, len(state.finished))
        return state

    def _owed_row(self) -> StepFigures | None:
        if self.unwritten is None:
            return None
        figures = self.telemetry.tally.drain() | self.unwritten  # in this order: it may hold the drained tally already
        return StepFigures(at=time.time(), weight_version=self.publisher.version, figures=figures)

    def _conclude(self) -> TrainerState:
        source_ended = self.step < self.settings.steps
        if source_ended and self.connections.stop.is_set():
            _log.info("stopped at step %d of %d", self.step, self.settings.steps)
            return "training"
        message = f"{'the source ended' if source_ended else 'finished'} at step {self.step} of {self.settings.steps}"
        _log.info(message)
        self.connections.run.record_event("trainer", "finished", message, step=self.step, source_ended=source_ended)
        self._report("finished")
        return "finished"


def _by_window(pairs: list[Preference]) -> list[WindowPairs]:
    windows: dict[str, list[Preference]] = {}
    for pair in pairs:
        windows.setdefault(pair.window_id, []).append(pair)
    return [tuple(window) for window in windows.values()]
