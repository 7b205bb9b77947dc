"""Opening, migrating and failing, each on SQLite and on PostgreSQL where both can."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine

from shared.database import Base, CandidateRow, ChunkRow, RunRow, migrate, open_database, transaction
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


def test_candidates_go_with_their_chunk(database: Engine) -> None:
    with transaction(database) as session:
        chunk = ChunkRow(run_id="r", document_id="0.0.0.0", start=8, prefix="p", scored_at=1.0)
        session.add(chunk)
        session.flush()
        session.add(CandidateRow(chunk_id=chunk.id, kind="original", text="漢", num_tokens=3, scores={"q": 0.5}))
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
