"""The training loop: `Trainer.run`, one step on one screen (`Trainer.take_step`). Every rank runs it.

    order from rank 0 -> publish? -> passes -> loss, backward -> clip -> optimizer -> row
                         every checkpoint_every steps: copy to memory -> checkpoint -> acknowledge, in the background

While a step computes, the inbox reads ahead, the publisher writes weights, and a checkpoint is written. The loop itself
waits for windows (in slices, so that every rank can be stopped), for a checkpoint only if the one before is still being
written, and in `replicas.keep_up` if the settings say so.

SIGTERM on any rank sets `stop`: all ranks finish the step in hand, write a checkpoint, and `run` returns.
"""

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import NoReturn

import torch
from torch import Tensor

from shared.coordination import TrainerState
from shared.errors import HeadwaterError, TrainingError
from shared.settings import TrainerSettings
from trainer.checkpoint import Checkpoints
from trainer.figures import Tally
from trainer.layouts.base import Layout, Pass
from trainer.lead import Lead, Order
from trainer.losses import Loss, LossTerms
from trainer.optimizer import PolicyOptimizer
from trainer.policy import Policy
from trainer.profiler import StepProfiler
from trainer.publisher import WeightPublisher
from trainer.ranks import Ranks
from trainer.sender import WeightSender
from trainer.throughput import Work

_log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Put together by trainer/assembly.py."""

    settings: TrainerSettings
    ranks: Ranks
    policy: Policy
    optimizer: PolicyOptimizer
    loss: Loss
    layout: Layout
    publisher: WeightPublisher | WeightSender
    checkpoints: Checkpoints
    profiler: StepProfiler
    tally: Tally
    lead: Lead | None
    """On rank 0 only."""
    step: int
    """Updates applied."""
    stop: Event = field(default_factory=Event)
    """Set when this rank is asked to stop."""
    opened: ExitStack = field(default_factory=ExitStack)
    """What `close` closes: threads, sinks, the lease."""
    checkpointed_step: int = field(init=False)
    """Of the newest checkpoint, which may still be being written; 0 before the first."""
    bad_steps: int = field(default=0, init=False)
    """Skipped steps in a row."""

    def __post_init__(self) -> None:
        self.checkpointed_step = self.step

    def close(self) -> None:
        self.opened.close()

    def run(self) -> TrainerState:
        """Train until `settings.steps`, the end of the source, or `stop`. Raises what keeps rank 0 from continuing; the
        newest step then has a checkpoint, unless another trainer has the run or the disk refuses."""
        if self.ranks.any(self.stop.is_set()):
            return "training"
        self._publish()  # before the first step: a broken weight path shows at once
        self.publisher.wait()
        with self.profiler:
            while not (order := self.next_order()).ends:
                if order.publishes:
                    self._publish()
                if order.plans:
                    self.take_step(order)
        return self._conclude()

    def next_order(self) -> Order:
        """About a second later at most."""
        with self.tally.spending("wait_ranks"):
            stop = self.ranks.any(self.stop.is_set())
        order = self.ranks.scatter(self.lead.orders(self.step, stop=stop) if self.lead else None)
        if order.failure:
            self._fail(order)
        return order

    def take_step(self, order: Order) -> None:
        """One optimizer step of all ranks, or a skipped one if loss or gradient are not finite."""
        step, began = self.step + 1, time.perf_counter()
        self.profiler.step(step)
        with self.ranks.guarding(f"step {step}"):
            figures, work = self._accumulate_gradients(order)
            with self.tally.spending("optimizer"):
                figures["grad_norm"] = self.optimizer.clip()
                if is_finite := all(math.isfinite(figures[name]) for name in ("loss", "grad_norm")):
                    figures["learning_rate"] = self.optimizer.step(step)
        if not is_finite:
            return self._skip(step, figures)
        self.step, self.bad_steps = step, 0
        every = self.settings.refresh_reference_every
        if every and step % every == 0:
            self.policy.refresh_reference(step)
        if self.lead:
            self.lead.applied(step, figures, work, computing_s=time.perf_counter() - began)
        if step % self.settings.checkpoint_every == 0:
            self._checkpoint()
        return None

    def _accumulate_gradients(self, order: Order) -> tuple[dict[str, float], Tensor]:
        """Backward over this rank's passes. Returns the loss, the mean figures and the work of the whole step."""
        self.optimizer.zero_grad()
        work, sums = Work(), dict[str, Tensor]()
        with self.tally.spending("forward_backward"):
            for plan in order.plans:
                one = self.layout.lay_out(plan, device=self.ranks.device)
                terms = self._terms(one)
                (terms.loss_sum * (plan.counted / order.normaliser)).backward()  # type: ignore[no-untyped-call]
                if plan.counted:
                    work.add(one)
                for name, value in (terms.figures | {"loss": terms.loss_sum.detach().double()}).items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * plan.counted
            totals = self.ranks.sum(torch.cat([work.tensor(), torch.stack([*sums.values()]).cpu()]))
        counts, values = totals[: -len(sums)], totals[-len(sums) :].tolist()
        figures = {name: value / order.num_pairs for name, value in zip(sums, values, strict=True)}
        figures["loss"] *= order.num_pairs / order.normaliser
        return figures, counts

    def _terms(self, one: Pass) -> LossTerms:
        reference = None
        if self.policy.reference_log_probs is not None:
            with torch.no_grad():
                reference = self.policy.reference_log_probs(one)
        return self.loss.terms(self.policy.log_probs(one), reference, one.num_targets)

    def _skip(self, step: int, figures: dict[str, float]) -> None:
        """Nothing is applied; the windows are used up. Raises TrainingError after `max_bad_steps` in a row."""
        self.bad_steps += 1
        self.optimizer.zero_grad()
        what = f"step {step} skipped: loss {figures['loss']}, gradient norm {figures['grad_norm']}"
        _log.error("%s (%d in a row)", what, self.bad_steps)
        if self.lead:
            self.lead.skipped(what, step=step)
        if self.bad_steps >= self.settings.max_bad_steps:
            self.checkpoints.wait()
            raise TrainingError(
                f"{self.bad_steps} steps in a row without a finite loss (trainer.max_bad_steps), the last: {what}; "
                f"the checkpoint of step {self.checkpointed_step} is intact: lower learning_rate and start again"
            )

    def _publish(self) -> None:
        with self.tally.spending("wait_publish"):
            self.publisher.begin(self.policy.model, self.step)

    def _checkpoint(self, *, settles: bool = True) -> None:
        """Begin the checkpoint of this step, unless it has one. It is written while training continues; then the ledger
        and the stream are told, if it `settles`: else the next start does."""
        if self.checkpointed_step == self.step:
            return
        with self.tally.spending("wait_checkpoint"):
            self.checkpoints.wait()
            state = then = None
            if self.lead:
                state = self.lead.next_state(self.step, reference_step=self.policy.reference_step)
                then = partial(self.lead.settle, state) if settles else None
            self.checkpoints.begin(state, self.policy, self.optimizer, then=then)
        self.checkpointed_step = self.step

    def _fail(self, order: Order) -> NoReturn:
        """Rank 0 can't continue, so no rank can."""
        if order.leaves_checkpoint:
            try:
                self._checkpoint(settles=False)  # the next start writes what it owes to ledger and stream
                self.checkpoints.wait()
            except HeadwaterError as exc:
                _log.error("on the way out, the checkpoint of step %d met: %s", self.step, exc)
        if self.lead and self.lead.error:
            raise self.lead.error
        raise TrainingError(f"rank 0 ended: {order.failure}")

    def _conclude(self) -> TrainerState:
        """The last step has its checkpoint, and is published whatever `push_every` says."""
        stopped = self.ranks.any(self.stop.is_set())
        self._checkpoint()
        self.checkpoints.wait()
        self.publisher.wait()
        if self.publisher.offered_step != self.step and not stopped:
            self._publish()
        self.publisher.wait()
        state = self.ranks.on_main(partial(self._told, stopped=stopped))
        self.ranks.leave()
        return state

    def _told(self, *, stopped: bool) -> TrainerState:
        assert self.lead is not None
        return self.lead.conclude(self.step, stopped=stopped)
