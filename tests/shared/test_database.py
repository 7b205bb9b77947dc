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
from sqlalchemy import Engine

from shared import migrations
from shared.database import Base, CandidateRow, ChunkRow, RunRow, migrate, open_database, transaction, translated
from shared.errors import DatabaseError


def test_migrations_make_exactly_the_models(database: Engine) -> None:
    with database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_migrating_again_changes_nothing(database: Engine) -> None:
    with transaction(database) as session:
        session.add(RunRow(id="a", created_at=1.0, settings={"deep": [1, None]}))
    migrate(database)
    with transaction(database) as session:
        assert session.scalars(sa.select(RunRow)).one().settings == {"deep": [1, None]}


def test_the_kinds_of_candidates_survive_the_second_migration(database_url: str) -> None:
    engine = open_database(database_url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO chunks VALUES (1, 'r', '0.0.0.0', 8, 'p', '', '', 0, 0, '', 1.0)"))
        connection.execute(sa.text("INSERT INTO candidates VALUES (1, 1, 'rewrite', 't', 3, NULL, 0.5, '{}')"))
    migrate(engine)
    with transaction(engine) as session:
        row = session.scalars(sa.select(CandidateRow)).one()
        assert (row.kinds, row.text, row.reward) == ("rewrite", "t", 0.5)
    engine.dispose()


def test_a_failing_transaction_leaves_nothing(database: Engine) -> None:
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
    for engine in (frozen, other):
        engine.dispose()


def test_candidates_go_with_their_chunk(database: Engine) -> None:
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


def test_several_threads_write_at_once(database: Engine) -> None:
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


def test_a_database_without_tables_is_a_database_error(database_url: str) -> None:
    with pytest.raises(DatabaseError, match="runs"), transaction(open_database(database_url)) as session:
        session.add(RunRow(id="a", created_at=1.0, settings={}))


def test_an_unreachable_server_is_a_database_error() -> None:
    engine = open_database("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseError, match="database: "):
        migrate(engine)


def test_a_url_that_is_none_is_named() -> None:
    with pytest.raises(DatabaseError, match="is not an SQLAlchemy URL"):
        open_database("nonsense")


def test_sqlite_keeps_a_write_ahead_log_and_syncs(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'h.db'}")
    with engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(sa.text("PRAGMA synchronous")).scalar() == 2
    engine.dispose()


def test_what_the_database_refuses_is_no_outage(database: Engine) -> None:
    """A constraint, and a wrong statement (SQLite calls that an operational error)."""
    with transaction(database) as session:
        session.add(RunRow(id="a", created_at=1.0, settings={}))
    statements = ["INSERT INTO runs (id, created_at, settings) VALUES ('a', 1.0, '{}')", "SELECT * FROM nowhere"]
    for statement in statements:
        with pytest.raises(DatabaseError) as failure, transaction(database) as session:
            session.execute(sa.text(statement))
        assert not failure.value.retryable, statement


def test_a_number_out_of_range_is_no_outage(postgres_url: str) -> None:
    with pytest.raises(DatabaseError, match="out of range") as failure, transaction(open_database(postgres_url)) as one:
        one.execute(sa.text("SELECT CAST(3000000000 AS integer)"))
    assert not failure.value.retryable


def test_a_server_or_a_lock_that_is_in_the_way_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.database.BUSY_TIMEOUT_S", 0.1)
    locked, holder = (open_database(f"sqlite:///{tmp_path / 'h.db'}") for _ in range(2))
    migrate(locked)
    with holder.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="locked") as failure, transaction(locked) as session:
            session.add(RunRow(id="a", created_at=1.0, settings={}))
    assert failure.value.retryable
    with pytest.raises(DatabaseError) as failure:
        migrate(open_database("postgresql://nobody@127.0.0.1:1/none"))
    assert failure.value.retryable
