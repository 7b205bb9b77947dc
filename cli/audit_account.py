"""What the two sides of `headwater audit` say: the database in one consistent view, and the checkpoints' evidence."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cli.checkpoint_states import StateFile
from shared.database import CursorRow, DocumentRow, EventRow, StepRow, WeightVersionRow, translated
from shared.ledger import DROPPED, READING, SCORED, TRAINED, Balance
from trainer.evidence import EVIDENCE_FILE, Evidence, EvidenceFile, FinishedDocument

_D = DocumentRow


class Window(NamedTuple):
    """One row of `documents`."""

    part: int
    epoch: int
    position: int
    window: int
    state: str
    reason: str
    num_windows: int
    """Of its document; 0 in rows from before this was kept."""
    num_chunks: int
    policy_version: int | None
    trained_step: int | None
    num_pairs: int | None
    read_at: float

    @property
    def document(self) -> tuple[int, int, int]:
        return self.part, self.epoch, self.position

    def __str__(self) -> str:
        return f"{self.part}.{self.epoch}.{self.position}.{self.window}"


class Step(NamedTuple):
    """One row of `steps`."""

    policy_version: int
    num_pairs: int


@dataclass(frozen=True)
class Account:
    """The database at one moment."""

    windows: Mapping[str, Window]
    """By document id, in the order of reading."""
    cursors: Mapping[tuple[int, int], int]
    """(part, epoch) -> positions read."""
    steps: Mapping[int, Step]
    versions: Mapping[int, int]
    """Weight version -> the step after which it was published."""
    finished_step: int | None
    """Where the trainer's newest word is that it has finished."""
    source_ended_at: float | None
    """When it finished, where that was because the source had ended. Unix seconds."""

    def in_state(self, *states: str) -> dict[str, Window]:
        return {name: window for name, window in self.windows.items() if window.state in states}

    @cached_property
    def documents(self) -> dict[tuple[int, int, int], list[Window]]:
        """(part, epoch, position) -> its windows."""
        found: dict[tuple[int, int, int], list[Window]] = {}
        for window in self.windows.values():
            found.setdefault(window.document, []).append(window)
        return found

    @cached_property
    def balance(self) -> Balance:
        """The windows by state."""
        states = Counter(window.state for window in self.windows.values())
        return Balance(
            read=len(self.windows),
            trained=states[TRAINED],
            dropped=dict(Counter(window.reason for window in self.in_state(DROPPED).values())),
            reading=states[READING],
            scored=states[SCORED],
        )

    @cached_property
    def is_from_before(self) -> str:
        """Why the number of windows can't be proved; empty where it can."""
        number = sum(not window.num_windows for window in self.windows.values())
        return f"{number} windows were read before their number was kept" if number else ""


def read_account(engine: Engine, run_id: str) -> Account:
    with _one_view(engine) as session:
        event = session.scalars(
            sa.select(EventRow)
            .where(EventRow.run_id == run_id, EventRow.role == "trainer")
            .where(EventRow.kind.in_(("started", "resumed", "finished")))
            .order_by(EventRow.id.desc())
            .limit(1)
        ).first()
        data: dict[str, Any] = event.data if event is not None and event.kind == "finished" else {}
        return Account(
            windows={str(window): window for window in _windows(session, run_id)},
            cursors={
                (row.part, row.epoch): row.num_positions
                for row in session.scalars(sa.select(CursorRow).where(CursorRow.run_id == run_id))
            },
            steps={
                row.step: Step(row.policy_version, int(row.figures.get("pairs", 0)))
                for row in session.scalars(sa.select(StepRow).where(StepRow.run_id == run_id).order_by(StepRow.step))
            },
            versions={
                row.version: row.step
                for row in session.scalars(sa.select(WeightVersionRow).where(WeightVersionRow.run_id == run_id))
            },
            finished_step=data.get("step"),
            source_ended_at=event.at if event is not None and data.get("source_ended") else None,
        )


def _windows(session: Session, run_id: str) -> Iterator[Window]:
    columns = [getattr(_D, name) for name in Window._fields]
    query = sa.select(*columns).where(_D.run_id == run_id).order_by(_D.part, _D.epoch, _D.position, _D.window)
    return (Window(*row) for row in session.execute(query))


@contextmanager
def _one_view(engine: Engine) -> Iterator[Session]:
    """Everything read in it is of the same moment, whoever writes meanwhile. Raises DatabaseError."""
    level = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with translated(), engine.connect().execution_options(**level) as connection, Session(connection) as session:
        if not level:
            connection.exec_driver_sql("BEGIN")  # SQLite's driver begins none before a SELECT
        yield session


@dataclass(frozen=True)
class Testimony:
    """What the checkpoints say: the lines that each of them left, and those that are still on disk."""

    lines: tuple[Evidence, ...]
    damaged: tuple[str, ...]
    """What is wrong with the lines that can't be read."""
    states: Mapping[int, StateFile]
    """Of the checkpoints on disk, by step."""

    @property
    def is_from_before(self) -> str:
        """Why the lines are not the whole history; empty where they are."""
        if not self.lines and self._old_states:
            return f"this run's checkpoints are from before they left evidence ({EVIDENCE_FILE})"
        if self.lines and self.lines[0].number == 1 and self.lines[0].after:
            return f"steps 1 to {self.lines[0].after} are from before checkpoints left evidence ({EVIDENCE_FILE})"
        return ""

    @property
    def covered_after(self) -> int:
        """Updates up to this one are from before."""
        if not self.lines:
            return max(self._old_states, default=0)
        return self.lines[0].after if self.lines[0].number == 1 else 0

    @property
    def newest_step(self) -> int:
        return max([*self.states, *(line.step for line in self.lines)], default=0)

    @cached_property
    def witnesses(self) -> tuple[Evidence, ...]:
        """The lines; of checkpoints from before, what their own states say, which is less."""
        old = sorted(self._old_states.items())
        return self.lines or tuple(
            Evidence(number=n, after=0, step=step, finished=state.finished, partial=state.partial)
            for n, (step, state) in enumerate(old, start=1)
        )

    @cached_property
    def finished(self) -> dict[str, FinishedDocument]:
        return {document: finished for line in self.witnesses for document, finished in line.finished.items()}

    @property
    def _old_states(self) -> dict[int, StateFile]:
        return {step: state for step, state in self.states.items() if not state.number}

    def is_settled(self, line: Evidence, account: Account) -> bool:
        """Whether the ledger knows of it. Only of the newest it may not: its trainer works on that at this moment, or
        ended in between and will do it at the next start. The ledger marks all windows of a line or none."""
        if line is not self.witnesses[-1] or (account.finished_step or 0) >= line.step:
            return True
        rows = (account.windows.get(document) for document in line.finished)
        return any(row is not None and row.state == TRAINED for row in rows)


def read_lines(checkpoints: Path) -> tuple[tuple[Evidence, ...], tuple[str, ...]]:
    """The lines, and what is wrong with those that can't be read."""
    lines, damaged = EvidenceFile(checkpoints / EVIDENCE_FILE).read()
    return tuple(lines), tuple(damaged)
