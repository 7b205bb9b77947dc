"""Checkpoints: a folder per step, complete or absent.

    checkpoints/step-00000050/policy/                 `AutoModelForCausalLM.from_pretrained`, tokenizer included
                              reference/              only if the reference was ever refreshed
                              optimizer.safetensors   moments by parameter name, and the random state
                              state.json              written last: step, version, windows
    checkpoints/finished.jsonl                        evidence: what each checkpoint finished, kept for ever

The folder is written as `step-00000050.7.tmp`, 7 being the number of the trainer's lease, synced and renamed. Next come
its line in finished.jsonl, acknowledging its windows (inbox.py), and deleting older checkpoints. The records are in
shared/checkpoint_state.py.

A trainer that was replaced without knowing it leaves nothing: it asks (`confirm`) before the rename and before the
line, and the new trainer deletes every `.tmp` before it looks for checkpoints, so that a rename after that finds none.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shared.checkpoint_state import (
    EVIDENCE_FILE,
    STATE_FILE,
    CheckpointState,
    EvidenceFile,
    checkpoint_folder,
    checkpoint_steps,
    read_state,
)
from shared.errors import FencedError, TrainingError
from trainer.policy import Policy, PolicyOptimizer

_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: CheckpointState

    def load_optimizer(self, optimizer: PolicyOptimizer) -> None:
        """Moments and random state. Raises TrainingError if they don't fit the policy."""
        path = self.folder / _OPTIMIZER
        try:
            tensors = load_file(path)
            torch.set_rng_state(tensors.pop("random.cpu"))
            cuda = tensors.pop("random.cuda", None)
            if cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda)
            optimizer.load_state(tensors)
        except (OSError, SafetensorError, KeyError) as exc:
            raise TrainingError(
                f"{path} can't be used: {exc!r}; restore the checkpoint, or delete its folder to go back to the one "
                "before it"
            ) from exc


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run."""

    root: Path
    keep: int
    writer: int = 0
    """The number of the trainer's lease: no two trainers write into one `.tmp`."""
    confirm: Callable[[], None] = lambda: None
    """Raises FencedError if another trainer has taken over."""

    def clear(self) -> None:
        """Delete what an earlier trainer left half written, or may still be writing."""
        for leftover in self.root.glob("step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The complete checkpoint with the highest step; None before the first. Raises TrainingError if it is damaged:
        an older one lacks the windows that were acknowledged with it."""
        if not (steps := checkpoint_steps(self.root)):
            return None
        folder = checkpoint_folder(self.root, steps[-1])
        return Checkpoint(folder, read_state(folder))

    def write(self, state: CheckpointState, policy: Policy, optimizer: PolicyOptimizer) -> Path:
        """All or nothing. Raises TrainingError if the disk refuses; earlier checkpoints stay intact."""
        folder = checkpoint_folder(self.root, state.step)
        temporary = self._temporary(state.step)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_into(temporary, state, policy, optimizer)
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            self.confirm()
            temporary.rename(folder)
            _sync(self.root)
        except FencedError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (OSError, SafetensorError) as exc:
            shutil.rmtree(temporary, ignore_errors=True)
            self.confirm()  # else a new trainer has deleted the folder
            raise TrainingError(f"checkpoint {folder} can't be written: {exc}; earlier ones are intact") from exc
        return folder

    def keep_evidence(self, state: CheckpointState) -> None:
        """Append what the checkpoint on disk contains; repeating it changes nothing. Raises TrainingError."""
        self.confirm()
        EvidenceFile(self.root / EVIDENCE_FILE).append(state.evidence)
        _sync(self.root)

    def prune(self) -> None:
        """Delete all but the newest `keep`. Renamed first, so that a crash never leaves half a checkpoint under a
        complete one's name."""
        for step in checkpoint_steps(self.root)[: -self.keep]:
            shutil.rmtree(checkpoint_folder(self.root, step).rename(self._temporary(step)), ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        folder = checkpoint_folder(self.root, step)
        return folder.with_name(f"{folder.name}.{self.writer}.tmp")


def _write_into(folder: Path, state: CheckpointState, policy: Policy, optimizer: PolicyOptimizer) -> None:
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    if policy.reference is not None and state.reference_step:
        policy.reference.save_pretrained(folder / "reference")
    tensors = optimizer.state() | {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / _OPTIMIZER)
    (folder / STATE_FILE).write_text(state.model_dump_json(indent=1), encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
