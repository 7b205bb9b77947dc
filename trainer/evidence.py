"""What every checkpoint of a run contained, kept when the checkpoint itself is long deleted. Without torch: `headwater
audit` reads it.

    checkpoints/finished.jsonl    one line a checkpoint: the documents that it finished, by update and number of pairs

A line is appended and synced when the checkpoint's folder is whole, before the ledger is told. A crash in between is
made up for by the next start; a line that a crash has torn is cut off before the next one is written.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import Field, ValidationError

from shared.errors import TrainingError
from shared.records import Record

EVIDENCE_FILE = "finished.jsonl"
_BLOCK_BYTES = 1 << 20


class FinishedDocument(Record):
    """A document whose pairs have all been used since the checkpoint before."""

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


class PartialDocument(Record):
    """A document of which some pairs have been used: its first `used` ones."""

    used: int = Field(ge=1)
    step: int | None
    """As in FinishedDocument."""
    pairs_by_step: dict[int, int] = Field(default_factory=dict)
    """As in FinishedDocument."""


class Evidence(Record):
    """One checkpoint's documents."""

    number: int = Field(ge=1)
    """1 is the first checkpoint that left evidence, each later one has the next number."""
    after: int = Field(ge=0)
    """Step of the checkpoint before it, 0 if there was none: the line accounts for the updates since."""
    step: int = Field(ge=0)
    finished: dict[str, FinishedDocument]
    """By document id."""
    partial: dict[str, PartialDocument]


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
