"""The training loop: `Trainer.run`, one step on one screen (`Trainer.take_step`).

    fill the inbox -> take pairs -> micro-batches -> loss, backward -> clip -> step -> publish -> row
                                                    every checkpoint_every steps: checkpoint -> acknowledge

The loop blocks only in `inbox.fill` (until a collector writes), in `replicas.keep_up` (where asked to) and in calls
that wait out a Redis or database that is away. SIGTERM sets `stop`: the step in hand is finished, a checkpoint is
written, `run` returns. A checkpoint is also written where one of them stays away for too long.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event

import torch
from torch import Tensor

from shared import metrics
from shared.checkpoint_state import CheckpointState, StepFigures
from shared.coordination import Coordination, TrainerReport, TrainerState
from shared.errors import DatabaseError, StreamError, TrainingError, WeightStoreError
from shared.runs import Run
from shared.settings import TrainerSettings
from trainer.batches import SequenceBatch, micro_batches, suffix_log_probs
from trainer.checkpoint import Checkpoints
from trainer.figures import Sink, Tally, pair_figures
from trainer.inbox import Inbox
from trainer.objectives import LossTerms, ObjectiveFunction
from trainer.patience import Patience
from trainer.policy import Policy, PolicyOptimizer
from trainer.preferences import Preference
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything that a step touches; put together by trainer/assembly.py."""

    settings: TrainerSettings
    push_every: int
    policy: Policy
    optimizer: PolicyOptimizer
    objective: ObjectiveFunction
    inbox: Inbox
    publisher: WeightPublisher
    replicas: Replicas
    checkpoints: Checkpoints
    coordination: Coordination
    records: Run
    sinks: Sequence[Sink]
    tally: Tally
    patience: Patience
    stop: Event
    step: int = 0
    """Updates applied; that of the checkpoint when resuming."""
    checkpointed_step: int = 0
    """Step of the newest checkpoint; 0 before the first: the model that the run began with needs none."""
    num_checkpoints: int = 0
    """Number of the newest checkpoint (CheckpointState)."""
    unwritten: dict[str, float] | None = field(default=None, init=False)
    """Figures of the newest step while the database does not have its row."""
    bad_steps: int = field(default=0, init=False)
    """Skipped steps in a row."""

    def run(self) -> TrainerState:
        """Train until `settings.steps`, the end of the source, or `stop`; a checkpoint is on disk when it returns.

        Where Redis, the database or the weight store stay away it raises their error, with a checkpoint of its newest
        step on disk too: what that owes to ledger and stream is paid at the next start.
        """
        if self.stop.is_set():
            return "training"
        try:
            return self._train()
        except (StreamError, DatabaseError, WeightStoreError):
            self._save_before_leaving()
            raise

    def _train(self) -> TrainerState:
        self._publish()  # before the first step: a broken weight path shows at once
        self._report("training")
        while self.step < self.settings.steps:
            pairs = self._next_pairs()
            if not pairs:
                break
            self.take_step(pairs)
            if self.step % self.settings.checkpoint_every == 0:
                self._checkpoint()
        self._checkpoint()
        return self._conclude()

    def take_step(self, pairs: list[Preference]) -> None:
        """One optimizer step on exactly these pairs, or a skipped one if loss or gradient are not finite."""
        step = self.step + 1
        with self.tally.spending("forward_backward"):
            figures = self._accumulate_gradients(pairs)
        with self.tally.spending("optimizer"):
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
        if step % self.push_every == 0:
            self._publish()
        self._write_row(self.unwritten)
        return self._report("training")

    def _next_pairs(self) -> list[Preference]:
        """Exactly `pairs_per_step` of them; the last ones of a source may be fewer; none means stop."""
        with self.tally.spending("wait"):
            self.inbox.fill(self.settings.pairs_per_step, weight_version=self.publisher.version)
        return [] if self.stop.is_set() else self.inbox.take(self.settings.pairs_per_step)

    def _accumulate_gradients(self, pairs: list[Preference]) -> dict[str, float]:
        """Backward over all micro-batches; returns the loss and the mean figures of the step."""
        self.optimizer.zero_grad()
        normaliser = global_sum(self.objective.normaliser(pairs))
        sums: dict[str, Tensor] = {}
        num_batch_tokens = 0
        for batch in micro_batches(pairs, self.settings.max_batch_tokens, device=self.policy.device):
            terms = self._loss_terms(batch)
            (terms.loss_sum / normaliser).backward()  # type: ignore[no-untyped-call]
            for name, value in (terms.figures | {"loss": terms.loss_sum.detach()}).items():
                sums[name] = sums[name] + value if name in sums else value
            num_batch_tokens += batch.input_ids.numel()
        num_pairs = global_sum(len(pairs))
        figures = {name: global_sum(float(value)) / num_pairs for name, value in sums.items()}
        figures["loss"] = global_sum(float(sums["loss"])) / normaliser
        return figures | {"batch_tokens": global_sum(num_batch_tokens)}

    def _loss_terms(self, batch: SequenceBatch) -> LossTerms:
        reference = None
        if self.policy.reference is not None:
            with torch.no_grad():
                reference = suffix_log_probs(self.policy.reference, batch)
        return self.objective.terms(suffix_log_probs(self.policy.model, batch), reference)

    def _skip(self, step: int, figures: dict[str, float], *, num_pairs: int) -> None:
        """Nothing is applied; the pairs are used up. Raises TrainingError after `max_bad_steps` in a row."""
        self.bad_steps += 1
        self.optimizer.zero_grad()
        self.tally.count("skipped_steps")
        metrics.skipped_steps_total.inc()
        what = f"step {step} skipped: loss {figures['loss']}, gradient norm {figures['grad_norm']}"
        _log.error("%s (%d in a row)", what, self.bad_steps)
        self.patience(lambda: self.records.record_event("trainer", "skipped_step", what, step=step, pairs=num_pairs))
        if self.bad_steps >= self.settings.max_bad_steps:
            raise TrainingError(
                f"{self.bad_steps} steps in a row without a finite loss (trainer.max_bad_steps), the last: {what}; "
                f"the checkpoint of step {self.checkpointed_step} is intact: lower learning_rate and start again"
            )

    def _publish(self) -> None:
        with self.tally.spending("push"):
            self.publisher.publish(self.policy.model, self.step)
        with self.tally.spending("replicas"):
            self.replicas.keep_up(self.publisher.version)

    def _write_row(self, figures: dict[str, float]) -> None:
        self.unwritten = row = figures | self.tally.drain()
        for sink in self.sinks:
            self.patience(lambda sink=sink: sink.write(self.step, self.publisher.version, row))  # type: ignore[misc]
        self.unwritten = None

    def _report(self, state: TrainerState) -> None:
        report = TrainerReport(self.step, self.publisher.version, state)
        self.patience(lambda: self.coordination.report_trainer(report))

    def _checkpoint(self) -> None:
        """Checkpoint and its evidence on disk, then ledger and acknowledgement, then older ones deleted: in this
        order."""
        if self.checkpointed_step == self.step:
            return
        with self.tally.spending("checkpoint"):
            state = self._write_checkpoint()
            self.inbox.commit(state.finished)
            self.checkpoints.prune()

    def _write_checkpoint(self) -> CheckpointState:
        """Needs neither Redis nor the database. Raises TrainingError."""
        state = CheckpointState(
            step=self.step,
            weight_version=self.publisher.version,
            reference_step=self.policy.reference_step,
            finished=self.inbox.finished(),
            partial=self.inbox.partial(),
            number=self.num_checkpoints + 1,
            after=self.checkpointed_step,
            row=self._owed_row(),
        )
        folder = self.checkpoints.write(state, self.policy, self.optimizer)
        self.checkpointed_step, self.num_checkpoints = self.step, state.number
        self.checkpoints.keep_evidence(state)
        _log.info("checkpoint %s: %d windows finished", folder, len(state.finished))
        return state

    def _owed_row(self) -> StepFigures | None:
        """None unless the newest step's row could not be written."""
        if self.unwritten is None:
            return None
        figures = self.tally.drain() | self.unwritten  # in this order: it may have been drained into it already
        return StepFigures(at=time.time(), weight_version=self.publisher.version, figures=figures)

    def _save_before_leaving(self) -> None:
        """What made the trainer leave stays the error that is told."""
        if self.checkpointed_step == self.step:
            return
        try:
            self._write_checkpoint()
        except TrainingError as exc:
            _log.error("no checkpoint of step %d on the way out: %s", self.step, exc)

    def _conclude(self) -> TrainerState:
        if self.step >= self.settings.steps:
            return self._finish(f"finished at step {self.step}", source_ended=False)
        if self.stop.is_set():
            _log.info("stopped at step %d of %d", self.step, self.settings.steps)
            return "training"
        return self._finish(f"the source ended at step {self.step} of {self.settings.steps}", source_ended=True)

    def _finish(self, message: str, *, source_ended: bool) -> TrainerState:
        _log.info(message)
        about = {"step": self.step, "source_ended": source_ended}
        self.patience(lambda: self.records.record_event("trainer", "finished", message, **about))
        self._report("finished")
        return "finished"


def global_sum(value: float) -> float:
    """Over all ranks. One process now: the one place that changes when there are several."""
    return value
