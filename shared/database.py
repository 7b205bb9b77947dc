"""SQLAlchemy models of what a run leaves behind, and the one way to open the database.

SQLite by default (one file in the run folder, write-ahead log, several processes), PostgreSQL by URL. The schema
is made and moved by Alembic (shared/migrations), never by `create_all`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, Engine, Index, String, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from shared.errors import DatabaseError, DatabaseRefusalError

BUSY_TIMEOUT_S = 30.0
IDLE_TRANSACTION_S = 60.0
"""PostgreSQL ends a transaction that is silent for this long: a frozen process must not hold rows for ever."""
_LongId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows by itself only in a column that is called INTEGER, which has 64 bits there."""


class Base(DeclarativeBase):
    """All tables. Times are Unix seconds, in UTC by nature."""

    type_annotation_map: ClassVar = {dict[str, Any]: JSON, list[Any]: JSON, str: String}


class RunRow(Base):
    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]
    settings: Mapped[dict[str, Any]]
    source: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    """What the documents were when the run began (its manifest); None until a process has read the source."""


class PartRow(Base):
    """One part of the source: who may write for it."""

    __tablename__ = "parts"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    lease_epoch: Mapped[int] = mapped_column(default=0)
    """The fencing number: raised by each collector that takes the part. Writes under a lower one are refused."""


class CursorRow(Base):
    """How far one epoch of one part was read, written in the same transaction as the windows that it counts."""

    __tablename__ = "cursors"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    num_positions: Mapped[int]
    """Positions 0 to num_positions - 1 were read."""


class WindowRow(Base):
    """One document window that was read: the cursor and the conservation law in one table.

    A window's row is written when it is read; its state then moves
    `reading` -> `scored` (on the stream) -> `trained` (in a checkpoint), or to `dropped` with a reason.
    """

    __tablename__ = "documents"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    part: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    window: Mapped[int] = mapped_column(primary_key=True)
    source_id: Mapped[str]
    """The document's own id, or `file:line`."""
    state: Mapped[str] = mapped_column(default="reading")
    reason: Mapped[str] = mapped_column(default="")
    """Why it was dropped: a short word that can be counted, such as `not_json` or `stale`."""
    detail: Mapped[str] = mapped_column(default="")
    """The whole sentence: file, line, what is wrong."""
    lease_epoch: Mapped[int] = mapped_column(default=0)
    """The fencing number (PartRow) of the collector that worked on it last."""
    num_windows: Mapped[int] = mapped_column(default=0)
    """How many windows its document has; 0 in rows from before this was kept."""
    num_tokens: Mapped[int] = mapped_column(default=0)
    num_chunks: Mapped[int] = mapped_column(default=0)
    num_dropped_chunks: Mapped[int] = mapped_column(default=0)
    weight_version: Mapped[int | None]
    """Oldest weight version among its rollouts."""
    trained_step: Mapped[int | None]
    num_pairs: Mapped[int | None]
    """Preference pairs that updates took from it; None until it is trained."""
    read_at: Mapped[float]
    finished_at: Mapped[float | None]
    __table_args__ = (Index("windows_by_state", "run_id", "state"),)


class ChunkRow(Base):
    """A scored (or dropped) chunk, for the share of windows that is kept for people."""

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
    scored_at: Mapped[float]


class CandidateRow(Base):
    __tablename__ = "candidates"
    id: Mapped[int] = mapped_column(_LongId, primary_key=True, autoincrement=True)
    chunk_id: Mapped[int] = mapped_column(_LongId, sa.ForeignKey("chunks.id", ondelete="CASCADE"), index=True)
    kinds: Mapped[str]
    """One word for each time that it was made, with commas between: `original,rewrite`, `rollout,rollout`."""
    text: Mapped[str]
    num_tokens: Mapped[int]
    weight_version: Mapped[int | None]
    reward: Mapped[float | None]
    scores: Mapped[dict[str, Any]]


class StepRow(Base):
    """One optimizer step. A step redone after a crash replaces its row."""

    __tablename__ = "steps"
    run_id: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    """1 is the first update; 0 is the model as it came."""
    at: Mapped[float]
    weight_version: Mapped[int]
    figures: Mapped[dict[str, Any]]
    """Metric name -> number: the names of trainer/figures.py, the same as in TensorBoard."""


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
    __tablename__ = "evaluations"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(index=True)
    step: Mapped[int]
    name: Mapped[str]
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    """95 % interval."""
    at: Mapped[float]


class EventRow(Base):
    """What a person wants to know afterwards: starts, stops, resumes, refused weights, a new judge."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run_id: Mapped[str] = mapped_column(index=True)
    at: Mapped[float]
    role: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]


def open_database(url: str) -> Engine:
    """An engine for `url`. SQLite waits for other writers and syncs commits to disk; PostgreSQL ends transactions that
    are left open."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as exc:
        raise DatabaseError("database.url is not an SQLAlchemy URL, such as postgresql://USER@HOST/DATABASE") from exc
    if parsed.get_backend_name() == "postgresql" and parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        engine = sa.create_engine(parsed, pool_pre_ping=True)
        if parsed.get_backend_name() == "postgresql":
            event.listen(engine, "connect", _prepare_postgresql)
        return engine
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = {int(IDLE_TRANSACTION_S * 1000)}")
    connection.commit()


def migrate(engine: Engine) -> None:
    """Bring the schema to the newest revision; safe to call from several processes, one after another."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with translated(), engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7201)"))
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # the driver begins none before DDL: two would both create
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One transaction: committed whole, or rolled back. Raises DatabaseError, or DatabaseRefusalError where a repeat is
    no use."""
    with translated(), Session(engine) as session, session.begin():
        yield session


def insert_if_absent(session: Session, table: type[Base], **values: Any) -> None:
    """A row with these values, unless there is one with its primary key: of several writers at once one inserts."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.execute(insert(table).values(values).on_conflict_do_nothing())


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors as DatabaseError (disk full, locked, unreachable), all others as DatabaseRefusalError."""
    try:
        yield
    except DBAPIError as exc:
        kind = DatabaseError if _may_pass(exc) else DatabaseRefusalError
        raise kind(f"database: {exc.orig}") from exc


def _may_pass(exc: DBAPIError) -> bool:
    """Whether the same call may succeed later. SQLite calls a wrong statement operational too."""
    is_wrong_statement = getattr(exc.orig, "sqlite_errorname", "") == "SQLITE_ERROR"
    return exc.connection_invalidated or (isinstance(exc, OperationalError) and not is_wrong_statement)
