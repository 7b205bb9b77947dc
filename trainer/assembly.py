"""Puts a trainer together from settings. Called by `python -m trainer` once the settings are parsed.

    train(settings, stop)                                 # a whole run
    trainer = prepare(settings, Retries(stop=stop))       # the same up to its first step: trainer.run()

What an interrupted checkpoint still owes (row, ledger, acknowledgement) is written before the stream is read.
"""

import logging
from contextlib import closing
from threading import Event

import torch

from shared.checkpoint_state import CheckpointState
from shared.coordination import TrainerReport
from shared.errors import DatabaseError, StreamError
from shared.retries import Retries
from shared.settings import Settings
from shared.weights.store import WeightStore
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.connections import Connections
from trainer.figures import open_telemetry
from trainer.inbox import Inbox, commit_finished
from trainer.layouts.separate import SeparateLayout
from trainer.loop import Trainer
from trainer.losses import build_loss
from trainer.policy import PolicyOptimizer, load_policy
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas

_GIVE_UP_S = 900.0
_log = logging.getLogger(__name__)


def train(settings: Settings, stop: Event) -> None:
    """Returns when the run finished or was asked to stop, even if Redis or the database was away then."""
    try:
        trainer = prepare(settings, Retries(give_up_s=_GIVE_UP_S, stop=stop))
        if trainer is not None:
            with closing(trainer.telemetry):
                trainer.run()
    except (StreamError, DatabaseError) as exc:
        if not (stop.is_set() and exc.retryable):
            raise
        _log.warning("stopped during an outage; the next start writes what the checkpoint owes: %s", exc)


def prepare(settings: Settings, retries: Retries) -> Trainer | None:
    """The trainer before its first step of this process; None if all its steps are done."""
    connections = Connections.open(settings, retries)
    checkpoints = Checkpoints(settings.run.folder / "checkpoints", keep=settings.trainer.keep_checkpoints)
    checkpoint = checkpoints.newest()
    if checkpoint is not None:
        state = checkpoint.state
        _log.info("resuming from %s", checkpoint.folder)
        _settle(state, checkpoints, connections)
        if state.step >= settings.trainer.steps:
            _log.info("finished already at step %d; raise trainer.steps to train further", state.step)
            connections.coordination.report_trainer(TrainerReport(state.step, state.weight_version, "finished"))
            return None
    return _build(settings, connections, checkpoints, checkpoint)


def _settle(state: CheckpointState, checkpoints: Checkpoints, connections: Connections) -> None:
    """Write what is missing if the trainer ended, or Redis or the database was away, right after this checkpoint."""
    checkpoints.keep_evidence(state)
    if state.row is not None:
        connections.run.record_step(state.step, state.row)
    commit_finished(state.finished, connections)


def _build(
    settings: Settings, connections: Connections, checkpoints: Checkpoints, checkpoint: Checkpoint | None
) -> Trainer:
    torch.manual_seed(settings.run.seed)
    if settings.trainer.num_threads:
        torch.set_num_threads(settings.trainer.num_threads)
    last, run, trainer = checkpoint.state if checkpoint else None, connections.run, settings.trainer
    step, loss = last.step if last else 0, build_loss(trainer)
    policy = load_policy(
        settings,
        checkpoint.folder if checkpoint else None,
        with_reference=loss.needs_reference,
        reference_step=last.reference_step if last else 0,
    )
    optimizer = PolicyOptimizer(policy.model, trainer)
    if checkpoint is not None:
        checkpoint.load_optimizer(optimizer)
    run.delete_steps_beyond(step)
    run.record_event("trainer", "resumed" if last else "started", f"at step {step}")
    telemetry = open_telemetry(settings, run, resume_step=step)
    store = WeightStore(settings.weight_store_url)
    publisher = WeightPublisher(store, connections.coordination, run, settings.weights, settings.weights_dtype)
    publisher.continue_after(last.weight_version if last else -1)
    return Trainer(
        settings=trainer,
        policy=policy,
        optimizer=optimizer,
        loss=loss,
        inbox=Inbox(settings, connections, partial=last.partial if last else {}, tally=telemetry.tally),
        publisher=publisher,
        replicas=Replicas(
            connections.coordination, run, trainer.max_policy_lag, trainer.replica_wait_s, connections.stop
        ),
        checkpoints=checkpoints,
        connections=connections,
        telemetry=telemetry,
        layout=SeparateLayout(),
        last=last,
    )
