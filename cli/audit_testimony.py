"""What the checkpoints say to `headwater audit`: the lines that each of them left, and those that are still on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cli.audit_account import Account
from shared.checkpoint_state import (
    EVIDENCE_FILE,
    CheckpointState,
    Evidence,
    EvidenceFile,
    FinishedWindow,
    read_states,
)
from shared.ledger import TRAINED


@dataclass(frozen=True)
class Testimony:
    lines: tuple[Evidence, ...]
    damaged: tuple[str, ...]
    """What is wrong with the lines that can't be read."""
    states: Mapping[int, CheckpointState]
    """Of the checkpoints on disk, by step."""
    num_bytes: int
    """Of the lines' file, before they were read."""

    @cached_property
    def newest_step(self) -> int:
        return max([*self.states, *(line.step for line in self.lines)], default=0)

    @cached_property
    def finished(self) -> dict[str, FinishedWindow]:
        return {document: finished for line in self.lines for document, finished in line.finished.items()}

    def is_settled(self, line: Evidence, account: Account) -> bool:
        """Whether the ledger knows of it. Only of the newest it may not: its trainer works on that at this moment, or
        ended in between and will do it at the next start. The ledger marks all windows of a line or none."""
        if line is not self.lines[-1] or (account.finished_step or 0) >= line.step:
            return True
        rows = (account.windows.get(document) for document in line.finished)
        return any(row is not None and row.state == TRAINED for row in rows)


def read_testimony(checkpoints: Path) -> Testimony:
    """The checkpoints first: each of them has its line by the time that the lines are read, the newest perhaps not."""
    states = read_states(checkpoints)
    num_bytes = _num_bytes(checkpoints)
    lines, damaged = EvidenceFile(checkpoints / EVIDENCE_FILE).read()
    return Testimony(tuple(lines), tuple(damaged), states, num_bytes)


def read_on(checkpoints: Path, earlier: Testimony) -> Testimony:
    """The same with the lines that were added since."""
    if _num_bytes(checkpoints) == earlier.num_bytes:
        return earlier
    lines, damaged = EvidenceFile(checkpoints / EVIDENCE_FILE).read()
    return replace(earlier, lines=tuple(lines), damaged=tuple(damaged))


def _num_bytes(checkpoints: Path) -> int:
    path = checkpoints / EVIDENCE_FILE
    return path.stat().st_size if path.exists() else 0
