"""What every checkpoint of a run contained, kept when the checkpoint itself is long deleted. Without torch: `headwater
audit` reads it.

    checkpoints/finished.jsonl    one line a checkpoint: the windows that it finished, by update and number of pairs

A line is appended and synced when the checkpoint's folder is whole, before the ledger is told. A crash in between is
made up for by the next start; a line that a crash has torn is cut off before the next one is written.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict, Field, ValidationError

from shared.errors import HeadwaterError, TrainingError
from shared.records import Record

EVIDENCE_FILE = "finished.jsonl"
_BLOCK_BYTES = 1 << 20


class FinishedWindow(Record):
    """A window whose pairs have all been used since the checkpoint before."""

    entry_id: str
    """Its entry on the stream, acknowledged once this checkpoint is on disk."""
    step: int | None
    """The last update that contains it; None if every step it was part of was skipped as non-finite."""
    pairs_by_step: dict[int, int] = Field(default_factory=dict)
    """Update -> how many of its pairs are in it. Empty in checkpoints from before this was kept."""
    num_skipped: int = Field(default=0, ge=0)
    """Pairs that were used up by skipped steps."""

    @property
    def num_pairs(self) -> int:
        return sum(self.pairs_by_step.values())


class PartialWindow(Record):
    """A window of which some pairs have been used: its first `used` ones."""

    used: int = Field(ge=1)
    step: int | None
    """As in FinishedWindow."""
    pairs_by_step: dict[int, int] = Field(default_factory=dict)
    """As in FinishedWindow."""


class Evidence(Record):
    """One checkpoint's windows."""

    number: int = Field(ge=1)
    """1 is the first checkpoint that left evidence, each later one has the next number."""
    after: int = Field(ge=0)
    """Step of the checkpoint before it, 0 if there was none: the line accounts for the updates since."""
    step: int = Field(ge=0)
    finished: dict[str, FinishedWindow]
    """By window id."""
    partial: dict[str, PartialWindow]


class StepFigures(Record):
    """One step's row in the database."""

    model_config = ConfigDict(ser_json_inf_nan="constants")
    at: float
    """Unix seconds."""
    weight_version: int
    figures: dict[str, float]


class CheckpointState(Record):
    """What state.json holds."""

    step: int = Field(ge=0)
    weight_version: int
    """The newest weight version when it was written."""
    reference_step: int = 0
    finished: dict[str, FinishedWindow] = Field(default_factory=dict)
    """By window id."""
    partial: dict[str, PartialWindow] = Field(default_factory=dict)
    number: int = Field(default=0, ge=0)
    """1 is the run's first checkpoint; 0 in those from before this was kept, which leave no evidence."""
    after: int = Field(default=0, ge=0)
    """Step of the checkpoint before it; 0 if there was none."""
    row: StepFigures | None = None
    """The row of `step` where the database did not get it, because it was away when the trainer ended."""

    @property
    def evidence(self) -> Evidence:
        return Evidence(
            number=self.number, after=self.after, step=self.step, finished=self.finished, partial=self.partial
        )


@dataclass(frozen=True)
class EvidenceFile:
    """The file of one run."""

    path: Path

    def append(self, evidence: Evidence) -> None:
        """Write the line and sync it; nothing if it is there already. Raises TrainingError."""
        try:
            with self.path.open("a+b") as file:
                last, end = _last_line(file)
                file.truncate(end)
                if last and _covers(Evidence.model_validate_json(last), evidence):
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
        """All lines in order, and what is wrong with those that can't be read. A torn last line is none."""
        found: list[Evidence] = []
        damaged: list[str] = []
        if not self.path.exists():
            return found, damaged
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    found.append(Evidence.model_validate_json(line))
                except ValidationError as exc:
                    damaged.append(f"line {number} can't be read: {exc.errors()[0]['msg']}")
        return found, damaged


def _covers(last: Evidence, evidence: Evidence) -> bool:
    """A higher number stands there where the newest checkpoint was deleted by hand to go on from the one before."""
    return last.number > evidence.number or last == evidence


def _last_line(file: BinaryIO) -> tuple[bytes, int]:
    """The last whole line, and where it ends in the file."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while (start := end - len(tail)) > 0 and tail.count(b"\n") < 2:
        size = min(_BLOCK_BYTES, start)
        file.seek(start - size)
        tail = file.read(size) + tail
    whole, _, torn = tail.rpartition(b"\n")
    return whole.rpartition(b"\n")[2], end - len(torn)


_FOLDER = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class StateFile:
    """The part of a checkpoint's state.json that is about documents."""

    folder: Path
    number: int
    """0 in checkpoints from before they left evidence."""
    finished: dict[str, FinishedWindow]
    partial: dict[str, PartialWindow]
    owes_row: bool
    """The database does not have its step's row; the next start writes it."""


def read_states(checkpoints: Path) -> dict[int, StateFile]:
    """By step. Raises HeadwaterError if a complete checkpoint's state can't be read."""
    if not checkpoints.is_dir():
        return {}
    found: dict[int, StateFile] = {}
    for path in sorted(checkpoints.iterdir()):
        if match := _FOLDER.match(path.name):
            try:
                found[int(match[1])] = _read(path)
            except HeadwaterError:
                if path.exists():  # if not, the trainer has deleted it meanwhile
                    raise
    return found


def newest_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder, or None before the first."""
    states = read_states(checkpoints)
    return (step := max(states), states[step].folder) if states else None


def newest_policy(run_folder: Path) -> Path:
    """The policy of a run's newest checkpoint. HeadwaterError before the first."""
    newest = newest_checkpoint(run_folder / "checkpoints")
    if newest is None:
        raise HeadwaterError(f"no checkpoint in {run_folder}: the run did not get that far")
    return newest[1] / "policy"


def _read(folder: Path) -> StateFile:
    path = folder / "state.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return StateFile(
            folder=folder,
            number=data.get("number", 0),
            finished={key: FinishedWindow.model_validate(value) for key, value in data["finished"].items()},
            partial={key: PartialWindow.model_validate(value) for key, value in data["partial"].items()},
            owes_row=data.get("row") is not None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise HeadwaterError(f"{path} can't be read: {exc!r}; the checkpoint is damaged") from exc
