"""Puts a trainer together from settings: opens Redis and the database, finds the checkpoint, loads the policy.

Called by `python -m trainer`, after the settings are parsed. The order matters: what an interrupted checkpoint still
owes (ledger, acknowledgement) is paid before anything is read from the stream.
"""

import logging
from dataclasses import dataclass
from threading import Event

import torch

from shared.coordination import Coordination, TrainerReport
from shared.errors import DatabaseError, StreamError
from shared.redis import connect
from shared.runs import Run, open_run
from shared.settings import Settings
from shared.stream import WindowStream
from shared.weights.store import WeightStore
from trainer.checkpoint import Checkpoint, Checkpoints
from trainer.figures import Tally, open_sinks
from trainer.inbox import Inbox, commit_finished
from trainer.loop import Trainer
from trainer.objectives import build_objective
from trainer.patience import Patience
from trainer.policy import Policy, PolicyOptimizer, load_policy
from trainer.publisher import WeightPublisher
from trainer.replicas import Replicas

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Connections:
    stream: WindowStream
    coordination: Coordination
    run: Run
    patience: Patience


def train(settings: Settings, stop: Event) -> None:
    """A whole run of the trainer: fresh, resumed, or finished already. Returns when it ended in good order, as it also
    does when asked to stop while Redis or the database is away."""
    try:
        _train(settings, stop)
    except (StreamError, DatabaseError) as exc:
        if not (stop.is_set() and exc.retryable):
            raise
        _log.warning("stopped while waiting; the next start pays what the checkpoint owes: %s", exc)


def _train(settings: Settings, stop: Event) -> None:
    trainer = prepare(settings, stop)
    if trainer is None:
        return
    try:
        trainer.run()
    finally:
        for sink in trainer.sinks:
            sink.close()


def prepare(settings: Settings, stop: Event) -> Trainer | None:
    """The trainer as it stands before its first step of this process; None if its steps are done already."""
    connections = _connect(settings, stop)
    checkpoints = Checkpoints(settings.run.folder / "checkpoints", keep=settings.trainer.keep_checkpoints)
    checkpoint = checkpoints.newest()
    if checkpoint is not None:
        _settle(checkpoint, checkpoints, connections)
        if checkpoint.state.step >= settings.trainer.steps:
            _say_finished_already(checkpoint, connections)
            return None
    return _build(settings, stop, connections, checkpoints, checkpoint)


def _build(
    settings: Settings,
    stop: Event,
    connections: _Connections,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
) -> Trainer:
    _set_up_torch(settings)
    policy, optimizer = _load(settings, checkpoint)
    step = checkpoint.state.step if checkpoint else 0
    stream, coordination = connections.stream, connections.coordination
    run, patience = connections.run, connections.patience
    patience(lambda: run.delete_steps_beyond(step))
    patience(lambda: run.record_event("trainer", "resumed" if checkpoint else "started", f"at step {step}"))
    tally = Tally()
    partial = checkpoint.state.partial if checkpoint else {}
    return Trainer(
        settings=settings.trainer,
        push_every=settings.weights.push_every,
        policy=policy,
        optimizer=optimizer,
        objective=build_objective(settings.trainer),
        inbox=Inbox(settings, stream, coordination, run, partial=partial, tally=tally, patience=patience, stop=stop),
        publisher=_publisher(settings, connections, checkpoint),
        replicas=Replicas(
            coordination,
            run,
            max_lag=settings.trainer.max_policy_lag,
            max_wait_s=settings.trainer.replica_wait_s,
            patience=patience,
            stop=stop,
        ),
        checkpoints=checkpoints,
        coordination=coordination,
        records=run,
        sinks=open_sinks(settings, run, resume_step=step),
        tally=tally,
        patience=patience,
        stop=stop,
        step=step,
        checkpointed_step=step,
        num_checkpoints=checkpoint.state.number if checkpoint else 0,
    )


def _connect(settings: Settings, stop: Event) -> _Connections:
    patience = Patience(stop)
    run = patience(lambda: open_run(settings))
    client = connect(settings.redis.url, timeout_s=settings.redis.timeout_s)
    stream = WindowStream(client, settings.run.name)
    patience(stream.create)
    return _Connections(stream, Coordination(client, settings.run.name), run, patience)


def _settle(checkpoint: Checkpoint, checkpoints: Checkpoints, connections: _Connections) -> None:
    """A crash, or an end while Redis or the database was away, may have come between the checkpoint and its evidence,
    its step's row or its acknowledgement."""
    _log.info("resuming from %s", checkpoint.folder)
    state, run = checkpoint.state, connections.run
    checkpoints.keep_evidence(state)
    if (row := state.row) is not None:
        connections.patience(lambda: run.record_step(state.step, row))
    commit_finished(state.finished, run.ledger, connections.stream, connections.patience)


def _say_finished_already(checkpoint: Checkpoint, connections: _Connections) -> None:
    state = checkpoint.state
    _log.info("finished already at step %d; a larger trainer.steps goes on from there", state.step)
    report = TrainerReport(state.step, state.weight_version, "finished")
    connections.patience(lambda: connections.coordination.report_trainer(report))


def _load(settings: Settings, checkpoint: Checkpoint | None) -> tuple[Policy, PolicyOptimizer]:
    policy = load_policy(
        settings.policy,
        settings.trainer.device,
        with_reference=build_objective(settings.trainer).needs_reference,
        activation_checkpointing=settings.trainer.activation_checkpointing,
        checkpoint=checkpoint.folder if checkpoint else None,
        reference_step=checkpoint.state.reference_step if checkpoint else 0,
    )
    optimizer = PolicyOptimizer(policy.model, settings.trainer)
    if checkpoint is not None:
        checkpoint.load_optimizer(optimizer)
    return policy, optimizer


def _publisher(settings: Settings, connections: _Connections, checkpoint: Checkpoint | None) -> WeightPublisher:
    publisher = WeightPublisher(
        store=WeightStore(settings.weight_store_url),
        coordination=connections.coordination,
        run=connections.run,
        dtype=settings.weights_dtype,
        full_every=settings.weights.full_every,
        keep_versions=settings.weights.keep_versions,
        patience=connections.patience,
    )
    publisher.continue_after(checkpoint.state.weight_version if checkpoint else -1)
    return publisher


def _set_up_torch(settings: Settings) -> None:
    torch.manual_seed(settings.run.seed)
    if settings.trainer.num_threads:
        torch.set_num_threads(settings.trainer.num_threads)
