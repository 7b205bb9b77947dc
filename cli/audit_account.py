"""What the database says to `headwater audit`, in one consistent view."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import CursorRow, EventRow, StepRow, WeightVersionRow, WindowRow, translated
from shared.ledger import DROPPED, READING, SCORED, TRAINED, Balance

_D = WindowRow


class Window(NamedTuple):
    """One row of `windows`."""

    part: int
    epoch: int
    position: int
    window: int
    state: str
    reason: str
    num_windows: int
    """Of its document."""
    num_chunks: int
    weight_version: int | None
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

    weight_version: int
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
                row.step: Step(row.weight_version, int(row.figures.get("pairs", 0)))
                for row in session.scalars(sa.select(StepRow).where(StepRow.run_id == run_id).order_by(StepRow.step))
            },
            versions={
                row.version: row.step
                for row in session.scalars(sa.select(WeightVersionRow).where(WeightVersionRow.run_id == run_id))
            },
            finished_step=data.get("step"),
            source_ended_at=event.at if event is not None and data.get("source_ended") else None,
        )


def read_waiting(engine: Engine, run_id: str) -> dict[str, Window]:
    """The windows in flight only."""
    with _one_view(engine) as session:
        waiting = _D.state.in_((READING, SCORED))
        return {str(window): window for window in _windows(session, run_id, waiting)}


def _windows(session: Session, run_id: str, *conditions: sa.ColumnElement[bool]) -> Iterator[Window]:
    columns = [getattr(_D, name) for name in Window._fields]
    query = sa.select(*columns).where(_D.run_id == run_id, *conditions)
    query = query.order_by(_D.part, _D.epoch, _D.position, _D.window)
    return (Window(*row) for row in session.execute(query))


@contextmanager
def _one_view(engine: Engine) -> Iterator[Session]:
    """Everything read in it is of the same moment, whoever writes meanwhile. Raises DatabaseError."""
    level = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
    with translated(), engine.connect().execution_options(**level) as connection, Session(connection) as session:
        if not level:
            connection.exec_driver_sql("BEGIN")  # SQLite's driver begins none before a SELECT
        yield session
