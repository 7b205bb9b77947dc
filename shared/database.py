"""The database of runs: its tables, and how it is opened, migrated and written.

SQLite by default (one file in the run folder, several processes), PostgreSQL by URL. Alembic changes the schema.

    database = open_database("sqlite:///runs/web/headwater.db")
    migrate(database)
    with transaction(database) as session:
        session.add(StepRow(run_id="web", step=1, at=time.time(), weight_version=1, figures={"loss": 0.69}))

Rows of a run are written through shared/runs.py and shared/ledger.py.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import JSON, Index, String, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shared.errors import DatabaseError, DatabaseRefusalError
from shared.records import FORM
from shared.secret_urls import without_secrets

MAX_TEXT = 2000
"""Characters of a message or a detail."""
BUSY_TIMEOUT_S = 30.0
IDLE_TRANSACTION_S = 60.0
"""PostgreSQL ends a transaction that is idle for this long, so that a frozen process does not lock rows for ever."""
_LongId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows only in a column of type INTEGER, which has 64 bits there."""


class Base(DeclarativeBase):
    """All tables. Times are Unix seconds."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON, list[Any]: JSON, str: String}


class RunRow(Base):
    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    form: Mapped[int] = mapped_column(default=FORM)
    settings: Mapped[dict[str, Any]]
    """Of the run's first start."""
    source: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """The manifest of its documents (shared/identity.py); None until a process has read the source."""


class PartRow(Base):
    __tablename__ = "parts"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(default=0)
    """The fencing number, raised by each collector that takes the part. Writes under a lower one are refused."""


class CursorRow(Base):
    """How far an epoch of a part was read. Written in the transaction of the windows that it counts."""

    __tablename__ = "cursors"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    num_positions: Mapped[int]


class WindowRow(Base):
    __tablename__ = "windows"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    window: Mapped[int] = mapped_column(primary_key=True)
    source_id: Mapped[str]
    """The document's id, or `file:line`."""
    state: Mapped[str] = mapped_column(default="reading")
    """`reading` -> `scored` (on the stream) -> `trained` (in a checkpoint), or `dropped` (shared/ledger.py)."""
    reason: Mapped[str] = mapped_column(default="")
    """Why it was dropped: a short word that can be counted, such as `not_json` or `stale`."""
    detail: Mapped[str] = mapped_column(default="")
    """The same as a sentence."""
    lease_epoch: Mapped[int] = mapped_column(default=0)
    """The fencing number (PartRow) of the collector that last worked on it."""
    num_windows: Mapped[int] = mapped_column(default=0)
    """Of its document."""
    num_tokens: Mapped[int] = mapped_column(default=0)
    num_chunks: Mapped[int] = mapped_column(default=0)
    num_dropped_chunks: Mapped[int] = mapped_column(default=0)
    weight_version: Mapped[int | None]
    trained_step: Mapped[int | None]
    num_pairs: Mapped[int | None]
    """That updates used; None until it is trained."""
    read_at: Mapped[float]
    finished_at: Mapped[float | None]
    __table_args__ = (Index("windows_by_state", "run_id", "state"),)


class ChunkRow(Base):
    """A scored or dropped chunk that is recorded for people to read."""

    __tablename__ = "chunks"
    id: Mapped[int] = mapped_column(_LongId, primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(index=True)
    window_id: Mapped[str] = mapped_column(index=True)
    start: Mapped[int]
    prefix: Mapped[str]
    fingerprint: Mapped[str] = mapped_column(default="")
    reasoning: Mapped[str] = mapped_column(default="")
    num_calls: Mapped[int] = mapped_column(default=0)
    num_failures: Mapped[int] = mapped_column(default=0)
    dropped_reason: Mapped[str] = mapped_column(default="")
    comparisons: Mapped[list[Any] | None] = mapped_column(JSON(none_as_null=True))
    """`[criterion, first, second, value]` each, by places among the candidates (see `Comparison`). None where no pairs
    were compared, and in rows of earlier versions."""
    scored_at: Mapped[float]
    text_start: Mapped[int | None]
    """Of the suffix in the window's text (WindowTextRow), in characters; None in rows of older versions."""
    text_end: Mapped[int | None]
    judge_seconds: Mapped[float | None]
    """Wall seconds of the judge's answer about the whole window, over its scored chunks."""


class WindowTextRow(Base):
    """The text of a recorded window: prefixes and originals of its chunks as the judge saw them."""

    __tablename__ = "window_texts"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    window_id: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]


class CandidateRow(Base):
    __tablename__ = "candidates"
    id: Mapped[int] = mapped_column(_LongId, primary_key=True, autoincrement=True)
    chunk_id: Mapped[int] = mapped_column(_LongId, sa.ForeignKey("chunks.id", ondelete="CASCADE"), index=True)
    kinds: Mapped[str]
    """One word for each time that it was made: `original,rewrite`, `rollout,rollout`."""
    text: Mapped[str]
    num_tokens: Mapped[int]
    weight_version: Mapped[int | None]
    reward: Mapped[float | None]
    """None: no judge was asked, or it could not score this candidate."""
    barred: Mapped[bool] = mapped_column(default=False)
    """Below some criterion's threshold: never chosen."""
    scores: Mapped[dict[str, Any]]


class StepRow(Base):
    """One optimizer step. A step redone after a crash replaces its row."""

    __tablename__ = "steps"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    weight_version: Mapped[int]
    figures: Mapped[dict[str, Any]]
    """By the names of trainer/figures.py, as in TensorBoard."""


class WeightVersionRow(Base):
    __tablename__ = "weight_versions"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int]
    form: Mapped[str]
    num_bytes: Mapped[int] = mapped_column(sa.BigInteger)
    seconds: Mapped[float]
    created_at: Mapped[float]


class EvaluationRow(Base):
    """One result of a checkpoint on one benchmark. Nothing writes it yet."""

    __tablename__ = "evaluations"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(index=True)
    step: Mapped[int]
    name: Mapped[str]
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    at: Mapped[float]


class EventRow(Base):
    """What a person wants to know afterwards: starts, stops, refused weights, a new judge."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[float]
    role: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]

    @classmethod
    def of(cls, run_id: str, role: str, kind: str, message: str, **data: Any) -> "EventRow":
        text = storable(without_secrets(message))[:MAX_TEXT]
        return cls(run_id=run_id, at=time.time(), role=role, kind=kind, message=text, data=data)


def storable(text: str) -> str:
    """PostgreSQL's text can't hold a NUL character, and no database half a surrogate pair; documents may."""
    return text.replace("\x00", "\ufffd").encode(errors="backslashreplace").decode()


def open_database(url: str) -> sa.Engine:
    """Connects at the first use. SQLite waits for writers and syncs commits; PostgreSQL ends idle transactions."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as exc:
        message = "database.url is not an SQLAlchemy URL, such as postgresql://USER@HOST/DATABASE"
        raise DatabaseRefusalError(message) from exc
    if parsed.get_backend_name() == "sqlite":
        if parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        database = sa.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})
        event.listen(database, "connect", _prepare_sqlite)
        return database
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    database = sa.create_engine(parsed, pool_pre_ping=True)
    if parsed.get_backend_name() == "postgresql":
        event.listen(database, "connect", _prepare_postgresql)
    return database


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(IDLE_TRANSACTION_S * 1000)}")
    connection.commit()


def migrate(database: sa.Engine, *, revision: str = "head") -> None:
    """Bring the schema up to `revision`. Several processes may call it at once: they take turns."""
    from alembic import command  # 0.2 s that readers of a run need not pay
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with translated(), database.begin() as connection:
        if database.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7201)"))
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins none before DDL: two would both create
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


@contextmanager
def transaction(database: sa.Engine) -> Iterator[Session]:
    """Committed whole, or rolled back. Raises DatabaseError, or DatabaseRefusalError where a retry can't help."""
    with translated(), Session(database) as session, session.begin():
        yield session


def insert_if_absent(session: Session, table: type[Base], **values: Any) -> None:
    """A row, unless there is one with its primary key: of several writers at once one inserts."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.execute(insert(table).values(values).on_conflict_do_nothing())


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors as DatabaseError (disk full, locked, unreachable), all others as DatabaseRefusalError."""
    try:
        yield
    except DBAPIError as exc:
        is_wrong_statement = getattr(exc.orig, "sqlite_errorname", "") == "SQLITE_ERROR"  # operational to SQLite
        may_pass = exc.connection_invalidated or (isinstance(exc, OperationalError) and not is_wrong_statement)
        raise (DatabaseError if may_pass else DatabaseRefusalError)(f"database: {exc.orig}") from exc
