"""Puts a trainer together from settings. Called by `python -m trainer` once the settings are parsed.

    train(settings, stop)                                 # a whole run
    trainer = prepare(settings, Retries(stop=stop))       # the same up to its first step: trainer.run()

What an interrupted checkpoint still owes (row, ledger, acknowledgement) is written before the stream is read.
"""

import logging
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
from trainer.loop import Trainer
from trainer.losses import build_loss
from trainer.policy import Policy, PolicyOptimizer, load_policy
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas

_GIVE_UP_S = 900.0
_log = logging.getLogger(__name__)


def train(settings: Settings, stop: Event) -> None:
    """A whole run: fresh, resumed, or finished already. Returns when it finished or was asked to stop, even if Redis or
    the database was away then."""
    try:
        _train(settings, stop)
    except (StreamError, DatabaseError) as exc:
        if not (stop.is_set() and exc.retryable):
            raise
        _log.warning("stopped during an outage; the next start writes what the checkpoint owes: %s", exc)


def _train(settings: Settings, stop: Event) -> None:
    trainer = prepare(settings, Retries(give_up_s=_GIVE_UP_S, stop=stop))
    if trainer is None:
        return
    try:
        trainer.run()
    finally:
        trainer.telemetry.close()


def prepare(settings: Settings, retries: Retries) -> Trainer | None:
    """The trainer before its first step of this process; None if all its steps are done."""
    connections = Connections.open(settings, retries)
    checkpoints = Checkpoints(settings.run.folder / "checkpoints", keep=settings.trainer.keep_checkpoints)
    checkpoint = checkpoints.newest()
    if checkpoint is not None:
        _settle(checkpoint, checkpoints, connections)
        if checkpoint.state.step >= settings.trainer.steps:
            _say_finished_already(checkpoint.state, connections)
            return None
    return _build(settings, connections, checkpoints, checkpoint)


def _settle(checkpoint: Checkpoint, checkpoints: Checkpoints, connections: Connections) -> None:
    """Write what is missing if the trainer ended, or Redis or the database was away, right after this checkpoint."""
    _log.info("resuming from %s", checkpoint.folder)
    state = checkpoint.state
    checkpoints.keep_evidence(state)
    if state.row is not None:
        connections.run.record_step(state.step, state.row)
    commit_finished(state.finished, connections)


def _say_finished_already(state: CheckpointState, connections: Connections) -> None:
    _log.info("finished already at step %d; raise trainer.steps to train further", state.step)
    connections.coordination.report_trainer(TrainerReport(state.step, state.weight_version, "finished"))


def _build(
    settings: Settings, connections: Connections, checkpoints: Checkpoints, checkpoint: Checkpoint | None
) -> Trainer:
    _set_up_torch(settings)
    last, run = checkpoint.state if checkpoint else None, connections.run
    step = last.step if last else 0
    policy, optimizer = _load(settings, checkpoint)
    run.delete_steps_beyond(step)
    run.record_event("trainer", "resumed" if last else "started", f"at step {step}")
    telemetry = open_telemetry(settings, run, resume_step=step)
    return Trainer(
        settings=settings.trainer,
        policy=policy,
        optimizer=optimizer,
        loss=build_loss(settings.trainer),
        inbox=Inbox(settings, connections, partial=last.partial if last else {}, tally=telemetry.tally),
        publisher=_publisher(settings, connections, last),
        replicas=_replicas(settings, connections),
        checkpoints=checkpoints,
        connections=connections,
        telemetry=telemetry,
        last=last,
    )


def _load(settings: Settings, checkpoint: Checkpoint | None) -> tuple[Policy, PolicyOptimizer]:
    policy = load_policy(
        settings.policy,
        settings.trainer.device,
        with_reference=build_loss(settings.trainer).needs_reference,
        activation_checkpointing=settings.trainer.activation_checkpointing,
        checkpoint=checkpoint.folder if checkpoint else None,
        reference_step=checkpoint.state.reference_step if checkpoint else 0,
    )
    optimizer = PolicyOptimizer(policy.model, settings.trainer)
    if checkpoint is not None:
        checkpoint.load_optimizer(optimizer)
    return policy, optimizer


def _publisher(settings: Settings, connections: Connections, last: CheckpointState | None) -> WeightPublisher:
    publisher = WeightPublisher(
        store=WeightStore(settings.weight_store_url),
        coordination=connections.coordination,
        run=connections.run,
        settings=settings.weights,
        dtype=settings.weights_dtype,
    )
    publisher.continue_after(last.weight_version if last else -1)
    return publisher


def _replicas(settings: Settings, connections: Connections) -> Replicas:
    return Replicas(
        connections.coordination,
        connections.run,
        max_lag=settings.trainer.max_policy_lag,
        max_wait_s=settings.trainer.replica_wait_s,
        stop=connections.stop,
    )


def _set_up_torch(settings: Settings) -> None:
    torch.manual_seed(settings.run.seed)
    if settings.trainer.num_threads:
        torch.set_num_threads(settings.trainer.num_threads)
