"""The three witnesses of `headwater audit`.

Account     the database at one moment
Testimony   the checkpoints: the line of evidence that each left, and the state of those still on disk
OnStream    Redis, or a copy of an embedded Redis's file, so that no run need be up and nothing is touched
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from cli.plan import REDIS_HOST, Ports, child_environ, redis_url
from cli.processes import Child, stop_children
from cli.run_folder import RunFolder
from cli.stack import find_redis_server, server_configuration, wait_until_it_answers
from shared.checkpoint_state import EVIDENCE_FILE, CheckpointState, Evidence, EvidenceFile, FinishedWindow, read_states
from shared.coordination import Coordination
from shared.database import CursorRow, EventRow, StepRow, WeightVersionRow, WindowRow, translated
from shared.errors import HeadwaterError, StreamError, StreamSchemaError
from shared.http import generate_token
from shared.ledger import DROPPED, READING, SCORED, TRAINED, Balance
from shared.redis import connect
from shared.settings import Settings
from shared.stream import WindowStream

_START_S = 60.0


class Window(NamedTuple):
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
    weight_version: int
    num_pairs: int


@dataclass(frozen=True)
class Account:
    """The database at one moment."""

    windows: Mapping[str, Window]
    """By id, in the order of reading."""
    cursors: Mapping[tuple[int, int], int]
    """(part, epoch) -> positions read."""
    steps: Mapping[int, Step]
    versions: Mapping[int, int]
    """Weight version -> the step after which it was published."""
    finished_step: int | None
    """None unless the trainer's newest event says that it has finished."""
    source_ended_at: float | None
    """Unix seconds; None unless it finished because the source had ended."""
    skipped: frozenset[str] = frozenset()
    """Windows of steps that the trainer skipped, by its events."""

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
        dropped = dict(Counter(window.reason for window in self.in_state(DROPPED).values()))
        return Balance(len(self.windows), states[TRAINED], dropped, reading=states[READING], scored=states[SCORED])


def read_account(database: sa.Engine, run_id: str) -> Account:
    about_trainer = (EventRow.role == "trainer", EventRow.kind.in_(("started", "resumed", "finished")))
    newest_event = sa.select(EventRow).where(EventRow.run_id == run_id, *about_trainer).order_by(EventRow.id.desc())
    skips = sa.select(EventRow).where(
        EventRow.run_id == run_id, EventRow.role == "trainer", EventRow.kind == "skipped_step"
    )
    cursors = sa.select(CursorRow).where(CursorRow.run_id == run_id)
    steps = sa.select(StepRow).where(StepRow.run_id == run_id).order_by(StepRow.step)
    versions = sa.select(WeightVersionRow).where(WeightVersionRow.run_id == run_id)
    with _one_view(database) as session:
        event = session.scalar(newest_event.limit(1))
        data: dict[str, Any] = event.data if event is not None and event.kind == "finished" else {}
        return Account(
            windows=_windows(session, run_id),
            cursors={(row.part, row.epoch): row.num_positions for row in session.scalars(cursors)},
            steps={
                row.step: Step(row.weight_version, int(row.figures.get("pairs", 0))) for row in session.scalars(steps)
            },
            versions={row.version: row.step for row in session.scalars(versions)},
            finished_step=data.get("step"),
            source_ended_at=event.at if event is not None and data.get("source_ended") else None,
            skipped=frozenset(window for skip in session.scalars(skips) for window in skip.data["windows"]),
        )


def read_waiting(database: sa.Engine, run_id: str) -> dict[str, Window]:
    """The windows in flight."""
    with _one_view(database) as session:
        return _windows(session, run_id, WindowRow.state.in_((READING, SCORED)))


def _windows(session: Session, run_id: str, *conditions: sa.ColumnElement[bool]) -> dict[str, Window]:
    """By id, in the order of reading."""
    columns = [getattr(WindowRow, name) for name in Window._fields]
    query = sa.select(*columns).where(WindowRow.run_id == run_id, *conditions).order_by(*columns[:4])
    windows = (Window(*row) for row in session.execute(query))
    return {str(window): window for window in windows}


@contextmanager
def _one_view(database: sa.Engine) -> Iterator[Session]:
    """Everything read in it is of the same moment. Raises DatabaseError."""
    level = {"isolation_level": "REPEATABLE READ"} if database.dialect.name == "postgresql" else {}
    with translated(), database.connect().execution_options(**level) as connection, Session(connection) as session:
        if not level:
            connection.exec_driver_sql("BEGIN")  # SQLite's driver starts no transaction at a SELECT
        yield session


@dataclass(frozen=True)
class Testimony:
    lines: tuple[Evidence, ...]
    damaged: tuple[str, ...]
    """What is wrong with unreadable lines."""
    states: Mapping[int, CheckpointState]
    """By step, of the checkpoints on disk."""
    num_bytes: int
    """Size of the file before it was read."""

    @cached_property
    def newest_step(self) -> int:
        return max([*self.states, *(line.step for line in self.lines)], default=0)

    @cached_property
    def finished(self) -> dict[str, FinishedWindow]:
        return {document: finished for line in self.lines for document, finished in line.finished.items()}

    def is_settled(self, line: Evidence, account: Account) -> bool:
        """Whether the ledger knows of the line. It may not know the newest: the trainer is marking it now, or ended
        first and will mark it at its next start. The ledger marks all windows of a line or none."""
        if line is not self.lines[-1] or (account.finished_step or 0) >= line.step:
            return True
        rows = (account.windows.get(document) for document in line.finished)
        return any(row is not None and row.state == TRAINED for row in rows)


def read_testimony(checkpoints: Path) -> Testimony:
    """Checkpoints first: each has its line when the lines are read, except perhaps the newest."""
    states = read_states(checkpoints)
    num_bytes = _num_bytes(checkpoints)
    lines, damaged = EvidenceFile(checkpoints / EVIDENCE_FILE).read()
    return Testimony(tuple(lines), tuple(damaged), states, num_bytes)


def read_on(checkpoints: Path, earlier: Testimony) -> Testimony:
    """The same, with the lines added since."""
    if _num_bytes(checkpoints) == earlier.num_bytes:
        return earlier
    lines, damaged = EvidenceFile(checkpoints / EVIDENCE_FILE).read()
    return replace(earlier, lines=tuple(lines), damaged=tuple(damaged))


def _num_bytes(checkpoints: Path) -> int:
    path = checkpoints / EVIDENCE_FILE
    return path.stat().st_size if path.exists() else 0


class StreamUnreachable(HeadwaterError):
    """The stream cannot be read; the audit says so instead of guessing."""


@dataclass(frozen=True)
class OnStream:
    documents: frozenset[str]
    """Ids of all windows on the stream, delivered or not."""
    leased: frozenset[int]
    """Parts of the source that a collector leases."""


def read_stream(settings: Settings, folder: RunFolder) -> OnStream:
    """Raises StreamUnreachable."""
    if settings.redis.url:
        return _read(settings.redis.url, settings)
    if not any(folder.redis.glob("*")):
        return OnStream(frozenset(), frozenset())  # the run never had a stream
    with _copy_served(folder.redis) as url:
        return _read(url, settings)


def _read(url: str, settings: Settings) -> OnStream:
    client, run_id = connect(url, timeout_s=5.0), settings.run.name
    try:
        leased = Coordination(client, run_id).leased_parts(num_parts=settings.documents.num_parts)
        return OnStream(frozenset(WindowStream(client, run_id).entries().values()), frozenset(leased))
    except (StreamError, StreamSchemaError) as exc:
        raise StreamUnreachable(str(exc)) from exc
    finally:
        client.close()


@contextmanager
def _copy_served(source: Path) -> Iterator[str]:
    """URL of a Redis that serves a copy of an embedded Redis's folder."""
    password = generate_token()
    with tempfile.TemporaryDirectory(prefix="headwater-audit-") as name, Ports() as ports:
        folder = Path(name)
        shutil.copytree(source, folder / "redis")
        port = ports.take(REDIS_HOST, 0)
        server = Child("redis", [find_redis_server(), "-"], log=folder / "redis.log", environ=child_environ())
        server.start(standard_input=server_configuration(folder / "redis", port=port, password=password))
        try:
            url = redis_url(port, password)
            try:
                wait_until_it_answers(url, timeout_s=_START_S, alive=lambda: server.is_running)
            except HeadwaterError as exc:
                what = "a copy of the run's Redis file cannot be served"
                raise StreamUnreachable(f"{what}: {exc}; {server.tail()}") from exc
            yield url
        finally:
            stop_children([server], timeout_s=10.0)
