"""The rows of weight versions, through the publisher itself, on SQLite and PostgreSQL: sizes beyond 32 bits, and what
follows where a version can't be recorded."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine

from shared import database as schema
from shared.database import CandidateRow, ChunkRow, WeightVersionRow, migrate, open_database, transaction
from shared.errors import DatabaseRefusalError
from shared.weights.store import Manifest, WeightStore
from tests.shared.conftest import database, database_url, postgres_url
from tests.trainer.conftest import Stack, tiny_llama
from trainer.patience import Patience
from trainer.publisher import WeightPublisher

__all__ = ["database", "database_url", "postgres_url"]  # fixtures

MakeStack = Callable[..., Stack]
GIB = 2**30


class HugeStore(WeightStore):
    """Writes what it is given, and says that it was `num_bytes`."""

    def __init__(self, root: str, num_bytes: int) -> None:
        super().__init__(root)
        self._num_bytes = num_bytes

    def publish(self, files: Mapping[str, bytes | bytearray], **about: object) -> Manifest:
        manifest = super().publish(files, **about)  # type: ignore[arg-type]
        (file,) = manifest.files
        return manifest.model_copy(update={"files": (file.model_copy(update={"num_bytes": self._num_bytes}),)})


def publisher_of(stack: Stack, engine: Engine, root: Path, *, num_bytes: int) -> WeightPublisher:
    made = WeightPublisher(
        store=HugeStore(str(root), num_bytes),
        coordination=stack.coordination,
        engine=engine,
        run_id=stack.run,
        dtype="float32",
        full_every=10,
        keep_versions=3,
        patience=Patience(Event()),
    )
    made.continue_after(-1)
    return made


def sizes(engine: Engine) -> list[int]:
    with transaction(engine) as session:
        return list(session.scalars(sa.select(WeightVersionRow.num_bytes).order_by(WeightVersionRow.version)))


def migrate_to(engine: Engine, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def test_versions_beyond_two_gib_are_recorded(make_stack: MakeStack, database: Engine, tmp_path: Path) -> None:
    stack, model = make_stack(), tiny_llama()
    for step, size in enumerate([3 * GIB, 20 * GIB]):
        publisher_of(stack, database, tmp_path / "store", num_bytes=size).publish(model, step)
    assert sizes(database) == [3 * GIB, 20 * GIB]


def test_a_database_of_the_first_schema_takes_them_too(
    make_stack: MakeStack, database_url: str, tmp_path: Path
) -> None:
    stack, engine = make_stack(), open_database(database_url)
    migrate_to(engine, "0001")
    with engine.begin() as connection:
        insert = "INSERT INTO weight_versions VALUES (:run, 0, 0, 'full', 5000, 0.5, 1.0)"
        connection.execute(sa.text(insert), {"run": stack.run})
    migrate(engine)
    stack.coordination.announce_weights(0)
    for step, size in enumerate([3 * GIB, 20 * GIB]):
        publisher_of(stack, engine, tmp_path / "store", num_bytes=size).publish(tiny_llama(), step)
    assert sizes(engine) == [5000, 3 * GIB, 20 * GIB]
    engine.dispose()


REFUSALS = {
    "sqlite": "CREATE TRIGGER no BEFORE INSERT ON weight_versions BEGIN SELECT RAISE(ABORT, 'weight_versions'); END",
    "postgresql": "ALTER TABLE weight_versions ADD CHECK (num_bytes < 5)",
}


def test_a_version_that_is_refused_stops_at_once_and_leaves_nothing(
    make_stack: MakeStack, database: Engine, tmp_path: Path
) -> None:
    """A restart does the same again, and must not leave a full version each time."""
    stack = make_stack()
    with database.begin() as connection:
        connection.execute(sa.text(REFUSALS[database.dialect.name]))
    for _ in range(2):
        publisher = publisher_of(stack, database, tmp_path / "store", num_bytes=5)
        began = time.monotonic()
        with pytest.raises(DatabaseRefusalError, match="weight_versions"):
            publisher.publish(tiny_llama(), 0)
        assert time.monotonic() - began < 30
        assert publisher.store.versions() == []
    assert stack.coordination.announced_version() is None


def test_a_version_whose_row_a_kill_prevented_gets_it_at_the_next_start(
    make_stack: MakeStack, database: Engine, tmp_path: Path
) -> None:
    stack, model = make_stack(), tiny_llama()
    first = publisher_of(stack, database, tmp_path / "store", num_bytes=5)
    first.publish(model, 0)
    first.store.publish({"model.safetensors": b"x"}, version=1, step=1, state_checksum="")
    second = publisher_of(stack, database, tmp_path / "store", num_bytes=7)
    assert second.publish(model, 0) == 2
    assert sizes(database) == [5, 1, 7]


def test_ids_of_recorded_candidates_go_beyond_32_bits(database: Engine) -> None:
    with transaction(database) as session:
        session.add(ChunkRow(id=2**31 - 1, run_id="r", window_id="0.0.0.0", start=8, prefix="p", scored_at=1.0))
    if database.dialect.name == "postgresql":
        with database.begin() as connection:
            for table in ("chunks", "candidates"):
                connection.execute(sa.text(f"SELECT setval('{table}_id_seq', {2**31 - 1})"))
    with transaction(database) as session:
        chunk = ChunkRow(run_id="r", window_id="0.0.0.1", start=8, prefix="p", scored_at=1.0)
        session.add(chunk)
        session.flush()
        session.add(CandidateRow(chunk_id=chunk.id, kinds="original", text="t", num_tokens=3, scores={}))
        assert chunk.id == 2**31
