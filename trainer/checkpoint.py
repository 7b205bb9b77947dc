"""Checkpoints: a folder per step, complete or absent, written while the next steps compute.

    checkpoints/step-00000050/policy/        `AutoModelForCausalLM.from_pretrained`, tokenizer included
                              reference/     only if the reference was ever refreshed
                              optimizer/     moments and random state, by torch.distributed.checkpoint
                              state.json     written last: step, version, windows
    checkpoints/finished.jsonl               evidence: what each checkpoint finished, kept for ever

    checkpoints.begin(state, policy, optimizer, then=...)     # all ranks: copies to memory, then returns
    checkpoints.wait()                                        # until it is on disk; raises the thread's error

The thread of every rank takes part, over a gloo group of its own. Rank 0 writes `step-00000050.<random>.tmp`, syncs and
renames it, appends the line in finished.jsonl and calls `then` (ledger, acknowledgement). Whoever begins the next one
waits for the one before. The records are in shared/checkpoint_state.py, the folder of a model in model_folder.py.

A trainer that was replaced without knowing it leaves nothing: it asks (`confirm`) before the rename and before the
line, and the new trainer deletes every `.tmp` before it looks for checkpoints, so that a rename after that finds none.
"""

import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from shared.checkpoint_state import (
    EVIDENCE_FILE,
    STATE_FILE,
    CheckpointState,
    EvidenceFile,
    checkpoint_folder,
    checkpoint_steps,
    read_state,
    read_states,
)
from shared.errors import HeadwaterError, TrainingError
from trainer.model_folder import ModelFolder
from trainer.moments import Moments, read_moments
from trainer.optimizer import PolicyOptimizer
from trainer.policy import Policy
from trainer.publication import layouts_of
from trainer.ranks import Ranks
from trainer.snapshot import Snapshot

_OPTIMIZER = "optimizer"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: CheckpointState

    def load_optimizer(self, optimizer: PolicyOptimizer, ranks: Ranks) -> None:
        """Moments and random state, all ranks together; it may have been written by another number of ranks. Raises
        TrainingError if they don't fit the policy."""
        path = self.folder / _OPTIMIZER
        try:
            read_moments(path, optimizer, ranks)
        except (OSError, TrainingError, ValueError, KeyError, CheckpointException) as exc:
            raise TrainingError(
                f"{path} can't be used: {_reason(exc)}; restore the checkpoint, or delete its folder to go back to the "
                "one before it"
            ) from exc


@dataclass
class Checkpoints:
    """The checkpoints of one run. All ranks have one and call `begin` and `wait` together."""

    root: Path
    keep: int
    ranks: Ranks
    confirm: Callable[[], None] = lambda: None
    """Raises if another trainer has taken over; called on rank 0 before the rename and before the evidence."""
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _weights: Snapshot = field(init=False)
    _reference: Snapshot = field(init=False)

    def __post_init__(self) -> None:
        group = self.ranks.group("checkpoint") if self.ranks.size > 1 else None
        self._weights, self._reference = Snapshot(group), Snapshot(group)

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint with the highest step; None before the first. Raises TrainingError if it is damaged:
        an older one lacks the windows that were acknowledged with it."""
        if not (steps := checkpoint_steps(self.root)):
            return None
        folder = checkpoint_folder(self.root, steps[-1])
        return Checkpoint(folder, read_state(folder))

    def states(self) -> list[CheckpointState]:
        """Of all complete checkpoints, oldest first. Raises TrainingError if one is damaged."""
        return list(read_states(self.root).values())

    def begin(
        self,
        state: CheckpointState | None,
        policy: Policy,
        optimizer: PolicyOptimizer,
        *,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Copy everything to memory and write it in the background. `state` and `then` are rank 0's: `then` is called
        when the checkpoint and its evidence are on disk. Raises the error of the checkpoint before it."""
        self.wait()
        self._weights.take(policy.model)
        parts: dict[str, tuple[Snapshot, ModelFolder]] = {
            "policy": (self._weights, ModelFolder.of(policy.model, policy.tokenizer))
        }
        if policy.reference is not None and policy.reference_step:
            self._reference.take(policy.reference)
            parts["reference"] = (self._reference, ModelFolder.of(policy.reference, None))
        moments = Moments.take(optimizer, self.ranks)
        self._thread = threading.Thread(
            target=self._work, args=(state, parts, moments, then), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """`wait` raises the error. Rank 0 asks at every step boundary; the other ranks end with it."""
        return self._error is not None

    def wait(self) -> None:
        """Until the checkpoint begun last is on disk and `then` is done. Raises its error: TrainingError if the disk
        refuses (earlier checkpoints stay intact), or what `confirm` or `then` raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the checkpoint in the making. Its error is only logged: the run has ended by another one."""
        try:
            self.wait()
        except HeadwaterError as exc:
            _log.error("the checkpoint in the making: %s", exc)

    def _work(
        self, state: CheckpointState | None, parts: "_Parts", moments: Moments, then: Callable[[], None] | None
    ) -> None:
        """In the thread: every rank ends with the same outcome."""
        try:
            with self.ranks.guarding("a checkpoint"):
                self._write_together(state, parts, moments, then)
        except BaseException as exc:  # noqa: BLE001  # the thread's error is raised by `wait`
            self._error = exc

    def _write_together(
        self, state: CheckpointState | None, parts: "_Parts", moments: Moments, then: Callable[[], None] | None
    ) -> None:
        folder, error = self._agree(lambda: self._make_folder(state))
        if error is None:
            error = self._write_parts(folder, parts, moments)
        _, outcome = self._agree(lambda: self._complete(folder, state, then, error))
        if outcome is not None:
            raise outcome

    def _agree(self, work: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """What `work` returned or raised on rank 0, on every rank."""
        answer: list[tuple[Any, BaseException | None]] = [(None, None)]
        if self.ranks.is_main:
            try:
                answer = [(work(), None)]
            except Exception as exc:  # noqa: BLE001  # it is raised on every rank
                answer = [(None, exc)]
        if self.ranks.size == 1:
            return answer[0]
        mine = answer[0]
        told = [(mine[0], None if mine[1] is None else TrainingError(str(mine[1])))]
        dist.broadcast_object_list(told, src=0, group=self.ranks.group("checkpoint"))
        return mine if self.ranks.is_main else told[0]

    def _make_folder(self, state: CheckpointState | None) -> Path:
        """Its name is no other process's: one that lost its lease must not touch the new trainer's."""
        assert state is not None
        folder = checkpoint_folder(self.root, state.step)
        folder = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            folder.mkdir(parents=True)
        except OSError as exc:
            raise _refused(folder, exc) from exc
        return folder

    def _write_parts(self, folder: Path, parts: "_Parts", moments: Moments) -> BaseException | None:
        """The first error of this rank, None if all went well. A rank never leaves a gather half way."""
        error: BaseException | None = None
        try:
            moments.write(folder / _OPTIMIZER, self.ranks)
        except (OSError, CheckpointException) as exc:
            error = exc
        for name, (snapshot, target) in parts.items():
            tensors = snapshot.tensors()
            try:
                if self.ranks.is_main and error is None:
                    target.write(folder / name, layouts_of(snapshot), tensors)
            except OSError as failed:
                error = failed
            for _ in tensors:  # other ranks, and what is left after an error
                pass
        return error

    def _complete(
        self,
        temporary: Path | None,
        state: CheckpointState | None,
        then: Callable[[], None] | None,
        error: BaseException | None,
    ) -> None:
        """State, sync, rename, evidence, `then`."""
        if temporary is None:  # not even the folder
            assert error is not None
            raise error
        assert state is not None
        folder = checkpoint_folder(self.root, state.step)
        try:
            if error is not None:
                raise error
            (temporary / STATE_FILE).write_text(state.model_dump_json(indent=1), encoding="utf-8")
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            self.confirm()
            temporary.rename(folder)
            _sync(self.root)
        except BaseException as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(exc, OSError | CheckpointException):
                self.confirm()  # else a new trainer has deleted the folder
                raise _refused(folder, exc) from exc
            raise
        self.confirm()
        self.keep_evidence(state)
        if then is not None:
            then()

    def keep_evidence(self, state: CheckpointState) -> None:
        """Append what the checkpoint on disk contains; repeating it changes nothing. Raises TrainingError."""
        self.confirm()
        EvidenceFile(self.root / EVIDENCE_FILE).append(state.evidence)
        _sync(self.root)

    def prune(self) -> None:
        """Delete all but the newest `keep`. Renamed first, so that a crash never leaves half a checkpoint under a
        complete one's name."""
        for step in checkpoint_steps(self.root)[: -self.keep]:
            folder = checkpoint_folder(self.root, step)
            old = folder.with_name(f"{folder.name}.old.tmp")
            folder.rename(old)
            shutil.rmtree(old, ignore_errors=True)

    def clear_unfinished(self) -> None:
        """Delete what an earlier process left half written. Once, at the start, by the trainer with the lease. Renamed
        first: a trainer that was replaced could else rename what is half deleted."""
        for leftover in [*self.root.glob("step-*.tmp")]:
            mine = leftover.with_name(f"step-{uuid.uuid4().hex}.tmp")
            with suppress(FileNotFoundError):  # it was renamed a moment before: a whole checkpoint
                leftover.rename(mine)
            shutil.rmtree(mine, ignore_errors=True)


_Parts = dict[str, tuple[Snapshot, ModelFolder]]


def _refused(folder: Path, exc: BaseException) -> TrainingError:
    return TrainingError(f"checkpoint {folder} can't be written: {_reason(exc)}; earlier ones are intact")


def _reason(exc: BaseException) -> str:
    """Of a CheckpointException the first rank's."""
    if isinstance(exc, CheckpointException) and exc.failures:
        rank, (inner, _) = next(iter(exc.failures.items()))
        return f"{inner} (rank {rank})"
    return repr(exc) if isinstance(exc, KeyError) else str(exc)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
