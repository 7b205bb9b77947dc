"""Puts a trainer together from settings, on every rank. Called by `python -m trainer` once the settings are parsed.

    train(settings, stop)                                 # a whole run
    trainer = prepare(settings, Retries(stop=stop))       # the same up to its first step: trainer.run()

Rank 0 waits for the lease, and writes what an interrupted checkpoint still owes (row, ledger, acknowledgement) before
the stream is read. Its errors end all ranks.
"""

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass
from threading import Event

import torch

from shared.checkpoint_state import CheckpointState
from shared.coordination import TrainerReport
from shared.errors import DatabaseError, StreamError, WeightStoreError
from shared.retries import Retries
from shared.settings import Settings
from shared.weights.store import WeightStore
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.connections import Connections
from trainer.figures import Tally, open_telemetry
from trainer.inbox import Inbox, commit_finished
from trainer.layouts.base import Layout
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.trial import choose_layout
from trainer.lead import Lead
from trainer.loop import Trainer
from trainer.losses import Loss, build_loss
from trainer.optimizer import PolicyOptimizer
from trainer.policy import Policy, load_policy
from trainer.profiler import StepProfiler
from trainer.publisher import PublishedSteps, WeightPublisher
from trainer.ranks import Ranks
from trainer.replicas import Replicas
from trainer.sender import WeightSender
from trainer.throughput import Throughput

_GIVE_UP_S = 900.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Start:
    """What rank 0 found, for all ranks."""

    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        return self.checkpoint.state.step if self.checkpoint else 0


def train(settings: Settings, stop: Event) -> None:
    """Returns when the run finished or was asked to stop, even if Redis, database or weight store was away then."""
    try:
        trainer = prepare(settings, Retries(give_up_s=_GIVE_UP_S, stop=stop))
        if trainer is not None:
            with closing(trainer):
                trainer.run()
    except (StreamError, DatabaseError, WeightStoreError) as exc:
        if not (stop.is_set() and exc.retryable):
            raise
        _log.warning("stopped during an outage; the next start writes what the checkpoint owes: %s", exc)


def prepare(settings: Settings, retries: Retries) -> Trainer | None:
    """The trainer before its first step of this process, which holds the lease until it is closed; None if all its
    steps are done, or it was asked to stop while another trainer held the run."""
    ranks = Ranks.join(settings.trainer.device)
    root = settings.run.folder / "checkpoints"
    checkpoints = Checkpoints(root, keep=settings.trainer.keep_checkpoints, ranks=ranks)
    with ExitStack() as opened:
        connections = ranks.only_on_main(lambda: Connections.open(settings, retries))
        if connections is not None:
            opened.callback(connections.close)
            checkpoints.confirm = connections.lease.confirm
        start = ranks.on_main(lambda: _settled(settings, connections, checkpoints))
        if start is None:
            ranks.leave()
            return None
        trainer = _build(settings, ranks, checkpoints, connections, start, opened)
        trainer.stop, trainer.opened = retries.stop, opened.pop_all()
    return trainer


def _settled(settings: Settings, connections: Connections | None, checkpoints: Checkpoints) -> _Start | None:
    """On rank 0: everything that earlier checkpoints owe is written. None: there is nothing to do."""
    if connections is None:
        _log.info("stopped before it was the run's trainer")
        return None
    checkpoints.clear_unfinished()  # before looking: a trainer that was replaced may still rename what it finds
    newest = checkpoints.newest()
    if newest is None:
        return _Start(None)
    state = newest.state
    _log.info("resuming from %s", newest.folder)
    for earlier in checkpoints.states():  # one that was not settled is never pruned
        _settle(earlier, checkpoints, connections)
    if state.step >= settings.trainer.steps:
        _log.info("finished already at step %d; raise trainer.steps to train further", state.step)
        connections.coordination.report_trainer(TrainerReport(state.step, state.weight_version, "finished"))
        return None
    return _Start(newest)


def _settle(state: CheckpointState, checkpoints: Checkpoints, connections: Connections) -> None:
    """Write what is missing if the trainer ended, or Redis or the database was away, right after this checkpoint."""
    checkpoints.keep_evidence(state)
    if state.row is not None:
        connections.run.record_step(state.step, state.row)
    commit_finished(state.finished, connections)


def _build(
    settings: Settings,
    ranks: Ranks,
    checkpoints: Checkpoints,
    connections: Connections | None,
    start: _Start,
    opened: ExitStack,
) -> Trainer:
    torch.manual_seed(settings.run.seed)
    if settings.trainer.num_threads:
        torch.set_num_threads(settings.trainer.num_threads)
    loss, checkpoint = build_loss(settings.trainer), start.checkpoint
    policy = load_policy(
        settings,
        checkpoint.folder if checkpoint else None,
        with_reference=loss.needs_reference,
        reference_step=checkpoint.state.reference_step if checkpoint else 0,
        ranks=ranks,
    )
    layout = _common_layout(policy, settings, ranks)
    optimizer = PolicyOptimizer(policy.model, settings.trainer)
    if checkpoint is not None:
        checkpoint.load_optimizer(optimizer, ranks)
    lead = ranks.only_on_main(
        lambda: _build_lead(settings, checkpoints, connections, start, loss=loss, layout=layout, policy=policy)
    )
    group = ranks.group("publication") if ranks.size > 1 else None
    publisher = lead.publisher if lead else WeightSender(dtype=settings.weights_dtype, group=group)
    opened.callback(publisher.close)
    opened.callback(checkpoints.close)
    if lead is not None:
        opened.callback(lead.telemetry.close)
        opened.callback(lead.inbox.close)
    return Trainer(
        settings=settings.trainer,
        ranks=ranks,
        policy=policy,
        optimizer=optimizer,
        loss=loss,
        layout=layout,
        publisher=publisher,
        checkpoints=checkpoints,
        profiler=StepProfiler(
            settings.trainer.profile_steps if ranks.is_main else None, folder=settings.run.folder / "profile"
        ),
        tally=lead.telemetry.tally if lead else Tally(),
        lead=lead,
        step=start.step,
    )


def _common_layout(policy: Policy, settings: Settings, ranks: Ranks) -> Layout:
    """The tree only if every rank finds it right."""
    models = [each for each in (policy.log_probs, policy.reference_log_probs) if each is not None]
    layout = choose_layout(models, settings.trainer, device=ranks.device, compute_dtype=policy.compute_dtype)
    if ranks.any(isinstance(layout, SeparateLayout)) and not isinstance(layout, SeparateLayout):
        layout = SeparateLayout()
        for model in models:
            model.model.set_attn_implementation(layout.attention_implementation)
    if ranks.is_main:
        form = "separate sequences" if isinstance(layout, SeparateLayout) else "document trees"
        _log.info("%s, attention %s, computing in %s", form, layout.attention_implementation, policy.compute_dtype)
    return layout


def _build_lead(
    settings: Settings,
    checkpoints: Checkpoints,
    connections: Connections | None,
    start: _Start,
    *,
    loss: Loss,
    layout: Layout,
    policy: Policy,
) -> Lead:
    assert connections is not None
    run, trainer, ranks = connections.run, settings.trainer, checkpoints.ranks
    run.delete_steps_beyond(start.step)
    run.record_event("trainer", "resumed" if start.checkpoint else "started", f"at step {start.step}")
    telemetry = open_telemetry(settings, run, resume_step=start.step)
    publisher = _open_publisher(settings, connections, ranks)
    last = start.checkpoint.state if start.checkpoint else None
    publisher.continue_after(last.weight_version if last else -1)
    return Lead(
        settings=trainer,
        num_ranks=ranks.size,
        loss=loss,
        layout=layout,
        inbox=Inbox(settings, connections, steps=publisher.steps, tally=telemetry.tally),
        publisher=publisher,
        replicas=Replicas(
            connections.coordination,
            run,
            PublishedSteps(publisher.steps),
            max_lag=trainer.max_policy_lag,
            max_wait_s=trainer.replica_wait_s,
            stop=connections.stop,
        ),
        checkpoints=checkpoints,
        connections=connections,
        telemetry=telemetry,
        throughput=Throughput.of(policy.model, with_reference=loss.needs_reference, num_ranks=ranks.size),
        last=last,
    )


def _open_publisher(settings: Settings, connections: Connections, ranks: Ranks) -> WeightPublisher:
    lease = connections.lease
    return WeightPublisher(
        dtype=settings.weights_dtype,
        group=ranks.group("publication") if ranks.size > 1 else None,
        store=WeightStore(settings.weight_store_url, writer=lease.lease.epoch, confirm=lease.confirm),
        coordination=connections.coordination,
        run=connections.run,
        settings=settings.weights,
        retries=connections.retries,
    )
