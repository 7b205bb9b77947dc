"""What a checkpoint contains, without torch: the trainer writes it, `headwater audit` compares it with the ledger.

    checkpoints/step-00000050/state.json    CheckpointState: step, weight version, windows. Written last
                              policy/       the model itself (trainer/checkpoint.py)
                finished.jsonl              Evidence: one line a checkpoint, kept when the checkpoint is deleted

    states = read_states(run_folder / "checkpoints")        # {50: CheckpointState(step=50, ...)}
    lines, damaged = EvidenceFile(run_folder / "checkpoints" / EVIDENCE_FILE).read()

A line is appended and synced when the checkpoint is whole, before the ledger is told, or at the next start if a crash
came in between. Only a torn line is cut off first: a trainer that was replaced cuts off nothing that its successor has
written meanwhile.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict, Field, ValidationError

from shared.errors import HeadwaterError, TrainingError
from shared.records import Record

STATE_FILE = "state.json"
EVIDENCE_FILE = "finished.jsonl"
_FOLDER = re.compile(r"^step-(\d{8})$")
_BLOCK_BYTES = 1 << 20


class FinishedWindow(Record):
    """A window that an update since the checkpoint before contains, with all its pairs."""

    entry_id: str
    """Its entry on the stream, acknowledged once this checkpoint is on disk."""
    step: int = Field(ge=1)
    """The update."""
    num_pairs: int = Field(ge=1)


class Evidence(Record):
    number: int = Field(ge=1)
    """1, 2, ... in the order of checkpoints."""
    after: int = Field(ge=0)
    """Step of the checkpoint before it, 0 if there was none: the line accounts for the updates since."""
    step: int = Field(ge=0)
    finished: dict[str, FinishedWindow]
    """By window id."""


class StepFigures(Record):
    model_config = ConfigDict(ser_json_inf_nan="constants")
    at: float
    """Unix seconds."""
    weight_version: int
    figures: dict[str, float]


class CheckpointState(Evidence):
    weight_version: int
    """The newest when it was written."""
    reference_step: int = 0
    """After which step the reference was last refreshed; 0 if never."""
    row: StepFigures | None = None
    """The row of `step`, if the database was away when the trainer ended: the next start writes it."""

    @property
    def evidence(self) -> Evidence:
        return Evidence(**{name: getattr(self, name) for name in Evidence.model_fields})


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Of all complete checkpoints, ascending."""
    entries = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted(int(match[1]) for entry in entries if (match := _FOLDER.match(entry.name)))


def read_state(folder: Path) -> CheckpointState:
    """Raises TrainingError if it can't be read."""
    path = folder / STATE_FILE
    try:
        return CheckpointState.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as exc:
        reason = _first_error(exc) if isinstance(exc, ValidationError) else str(exc)
        remedy = "restore the checkpoint, or delete its folder to go back to the one before it"
        raise TrainingError(f"{path} can't be read ({reason}): {remedy}") from exc


def _first_error(exc: ValidationError) -> str:
    first = exc.errors()[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


def read_states(checkpoints: Path) -> dict[int, CheckpointState]:
    """Of all complete checkpoints, by step. Raises TrainingError if one can't be read."""
    found: dict[int, CheckpointState] = {}
    for step in checkpoint_steps(checkpoints):
        folder = checkpoint_folder(checkpoints, step)
        try:
            found[step] = read_state(folder)
        except TrainingError:
            if folder.exists():  # otherwise the trainer has deleted it meanwhile
                raise
    return found


def newest_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder, or None before the first. Raises TrainingError if a checkpoint's state can't be read."""
    states = read_states(checkpoints)
    return (step := max(states), checkpoint_folder(checkpoints, step)) if states else None


def newest_policy(run_folder: Path) -> Path:
    """The policy of a run's newest checkpoint. HeadwaterError before the first."""
    newest = newest_checkpoint(run_folder / "checkpoints")
    if newest is None:
        raise HeadwaterError(f"no checkpoint in {run_folder}: the run did not get that far")
    return newest[1] / "policy"


@dataclass(frozen=True)
class EvidenceFile:
    path: Path

    def append(self, evidence: Evidence) -> None:
        """Write the line and sync it; nothing if it is there already. Raises TrainingError."""
        try:
            with self.path.open("a+b") as file:
                last, torn_from = _last_line(file)
                if torn_from is not None:
                    file.truncate(torn_from)
                found = Evidence.model_validate_json(last) if last else None
                # a higher number is there where the newest checkpoint was deleted by hand
                if found and (found.number > evidence.number or found == evidence):
                    return
                file.write(evidence.model_dump_json().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValidationError) as exc:
            raise TrainingError(
                f"{self.path}, the evidence for `headwater audit`, can't be written: {exc}; free space, or move a "
                "damaged file away: the audit will then miss what was trained before"
            ) from exc

    def read(self) -> tuple[list[Evidence], list[str]]:
        """All lines in order, and what is wrong with unreadable ones. A torn last line does not count, nor does an
        exact copy: a trainer that was replaced while it wrote may repeat a line that its successor has written."""
        found: dict[bytes, Evidence] = {}
        damaged: list[str] = []
        if not self.path.exists():
            return [], damaged
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                if line in found:
                    continue
                try:
                    found[line] = Evidence.model_validate_json(line)
                except ValidationError as exc:
                    damaged.append(f"line {number} can't be read: {_first_error(exc)}")
        return list(found.values()), damaged


def _last_line(file: BinaryIO) -> tuple[bytes, int | None]:
    """The last whole line, and where a torn one after it begins; None if there is none."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while (start := end - len(tail)) > 0 and tail.count(b"\n") < 2:
        size = min(_BLOCK_BYTES, start)
        file.seek(start - size)
        tail = file.read(size) + tail
    whole, _, torn = tail.rpartition(b"\n")
    return whole.rpartition(b"\n")[2], end - len(torn) if torn else None
