"""Opening, migrating and failing, each on SQLite and on PostgreSQL where both can."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from shared import migrations
from shared.database import (
    Base,
    CandidateRow,
    ChunkRow,
    CursorRow,
    RunRow,
    StepRow,
    WeightVersionRow,
    WindowRow,
    migrate,
    open_database,
    transaction,
    translated,
)
from shared.errors import DatabaseError


def test_migrations_make_exactly_the_models(database: sa.Engine) -> None:
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_migrating_again_changes_nothing(database: sa.Engine) -> None:
    with transaction(database) as session:
        session.add(RunRow(id="a", created_at=1.0, settings={"deep": [1, None]}))
    migrate(database)
    with transaction(database) as session:
        assert session.scalars(sa.select(RunRow)).one().settings == {"deep": [1, None]}


FIRST_ROWS = (
    "INSERT INTO runs VALUES ('r', 1.0, '{}')",
    "INSERT INTO documents VALUES ('r', 0, 0, 3, 0, 'd', 'scored', '', '', 32, 3, 1, 2, NULL, 1.0, NULL)",
    "INSERT INTO chunks VALUES (1, 'r', '0.0.3.0', 8, 'p', '', '', 0, 0, '', 1.0)",
    "INSERT INTO candidates VALUES (1, 1, 'rollout', 't', 3, 2, 0.5, '{}')",
    "INSERT INTO steps VALUES ('r', 1, 1.0, 2, '{}')",
    "INSERT INTO weight_versions VALUES ('r', 2, 1, 'full', 5000, 0.5, 1.0)",
)


def rows_of_models(database: sa.Engine) -> dict[str, tuple[object, ...]]:
    """Of each table its one row, in the columns that migrations have changed or added."""
    columns = (
        (RunRow.id, RunRow.form),
        (WindowRow.position, WindowRow.source_id, WindowRow.weight_version, WindowRow.num_windows),
        (ChunkRow.id, ChunkRow.window_id, ChunkRow.comparisons),
        (CandidateRow.chunk_id, CandidateRow.kinds, CandidateRow.weight_version, CandidateRow.barred),
        (StepRow.step, StepRow.weight_version),
        (WeightVersionRow.version, WeightVersionRow.num_bytes),
        (CursorRow.epoch, CursorRow.num_positions),
    )
    with transaction(database) as session:
        return {one[0].class_.__tablename__: tuple(session.execute(sa.select(*one)).one()) for one in columns}


def test_rows_survive_every_migration_and_the_way_back(database_url: str) -> None:
    database = open_database(database_url)
    migrate(database, revision="0001")
    with database.begin() as connection:
        for row in FIRST_ROWS:
            connection.exec_driver_sql(row)
    migrate(database)
    expected = {
        "runs": ("r", 1),
        "windows": (3, "d", 2, 0),
        "chunks": (1, "0.0.3.0", None),
        "candidates": (1, "rollout", 2, False),
        "steps": (1, 2),
        "weight_versions": (2, 5000),
        "cursors": (0, 4),
    }
    assert rows_of_models(database) == expected
    downgrade(database, "0002")
    assert "documents" in sa.inspect(database).get_table_names()
    assert {index["name"] for index in sa.inspect(database).get_indexes("chunks")} >= {"ix_chunks_document_id"}
    migrate(database)
    assert rows_of_models(database) == expected
    database.dispose()


def downgrade(database: sa.Engine, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_a_failing_transaction_leaves_nothing(database: sa.Engine) -> None:
    def fail() -> None:
        with transaction(database) as session:
            session.add(RunRow(id="a", created_at=1.0, settings={}))
            session.flush()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    with transaction(database) as session:
        assert session.scalars(sa.select(RunRow)).all() == []


def test_postgresql_ends_the_transaction_of_a_frozen_process(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.database.IDLE_TRANSACTION_S", 0.3)
    lock = sa.text("SELECT pg_advisory_xact_lock(77)")
    frozen, other = open_database(postgres_url), open_database(postgres_url)
    with frozen.connect() as holding, other.begin() as waiting:
        holding.execute(lock)
        waiting.execute(sa.text("SET LOCAL lock_timeout = '20s'"))
        waiting.execute(lock)
        with pytest.raises(DatabaseError, match="idle-in-transaction timeout"), translated():
            holding.execute(sa.text("SELECT 1"))
    for database in (frozen, other):
        database.dispose()


def test_candidates_go_with_their_chunk(database: sa.Engine) -> None:
    with transaction(database) as session:
        chunk = ChunkRow(run_id="r", window_id="0.0.0.0", start=8, prefix="p", scored_at=1.0)
        session.add(chunk)
        session.flush()
        session.add(
            CandidateRow(chunk_id=chunk.id, kinds="original,rewrite", text="漢", num_tokens=3, scores={"q": 0.5})
        )
    with transaction(database) as session:
        session.execute(sa.delete(ChunkRow))
    with transaction(database) as session:
        assert session.scalars(sa.select(CandidateRow)).all() == []


def test_several_threads_write_at_once(database: sa.Engine) -> None:
    def write(name: int) -> None:
        for number in range(5):
            with transaction(database) as session:
                session.add(RunRow(id=f"{name}-{number}", created_at=1.0, settings={}))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with transaction(database) as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(RunRow)) == 20


def test_processes_may_migrate_at_the_same_time(database_url: str) -> None:
    code = "import sys; from shared.database import *; migrate(open_database(sys.argv[1]))"
    command = [sys.executable, "-c", code, database_url]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [b""] * 3
    assert [process.returncode for process in processes] == [0] * 3


def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(DatabaseError, match="is not an SQLAlchemy URL"):
        open_database("nonsense")


def test_sqlite_keeps_a_write_ahead_log_and_syncs(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'h.db'}")
    with database.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2
    database.dispose()


def test_what_the_database_refuses_is_no_outage(database: sa.Engine) -> None:
    """A constraint, a wrong statement (SQLite calls that an operational error), and a number out of range."""
    with transaction(database) as session:
        session.add(RunRow(id="a", created_at=1.0, settings={}))
    statements = ["INSERT INTO runs (id, created_at, settings) VALUES ('a', 1.0, '{}')", "SELECT * FROM nowhere"]
    if database.dialect.name == "postgresql":
        statements.append("SELECT CAST(3000000000 AS integer)")
    for statement in statements:
        with pytest.raises(DatabaseError, match="database: ") as failure, transaction(database) as session:
            session.execute(sa.text(statement))
        assert not failure.value.retryable, statement


def test_a_server_or_a_lock_that_is_in_the_way_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.database.BUSY_TIMEOUT_S", 0.1)
    locked, holder = (open_database(f"sqlite:///{tmp_path / 'h.db'}") for _ in range(2))
    migrate(locked)
    with holder.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked") as failure, transaction(locked) as session:
            session.add(RunRow(id="a", created_at=1.0, settings={}))
    assert failure.value.retryable
    with pytest.raises(DatabaseError, match="database: ") as failure:
        migrate(open_database("postgresql://nobody@127.0.0.1:1/none"))
    assert failure.value.retryable
