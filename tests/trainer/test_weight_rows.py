"""What the publisher does where a version can't be recorded, or where a kill prevented its row."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import pytest
import sqlalchemy as sa

from shared.database import WeightVersionRow, transaction
from shared.errors import DatabaseRefusalError
from shared.runs import Run
from shared.weights.store import Manifest, WeightStore
from tests.shared.conftest import database, database_url, postgres_url
from tests.trainer.conftest import Stack, tiny_llama
from trainer.patience import Patience
from trainer.publisher import WeightPublisher

__all__ = ["database", "database_url", "postgres_url"]  # fixtures

MakeStack = Callable[..., Stack]


class HugeStore(WeightStore):
    """Writes what it is given, and says that it was `num_bytes`."""

    def __init__(self, root: str, num_bytes: int) -> None:
        super().__init__(root)
        self._num_bytes = num_bytes

    def publish(self, files: Mapping[str, bytes | bytearray], **about: object) -> Manifest:
        manifest = super().publish(files, **about)  # type: ignore[arg-type]
        (file,) = manifest.files
        return manifest.model_copy(update={"files": (file.model_copy(update={"num_bytes": self._num_bytes}),)})


def publisher_of(stack: Stack, database: sa.Engine, root: Path, *, num_bytes: int) -> WeightPublisher:
    made = WeightPublisher(
        store=HugeStore(str(root), num_bytes),
        coordination=stack.coordination,
        run=Run(database, stack.run),
        dtype="float32",
        full_every=10,
        keep_versions=3,
        patience=Patience(Event()),
    )
    made.continue_after(-1)
    return made


def sizes(database: sa.Engine) -> list[int]:
    with transaction(database) as session:
        return list(session.scalars(sa.select(WeightVersionRow.num_bytes).order_by(WeightVersionRow.version)))


REFUSALS = {
    "sqlite": "CREATE TRIGGER no BEFORE INSERT ON weight_versions BEGIN SELECT RAISE(ABORT, 'weight_versions'); END",
    "postgresql": "ALTER TABLE weight_versions ADD CHECK (num_bytes < 5)",
}


def test_a_version_that_is_refused_stops_at_once_and_leaves_nothing(
    make_stack: MakeStack, database: sa.Engine, tmp_path: Path
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
    make_stack: MakeStack, database: sa.Engine, tmp_path: Path
) -> None:
    stack, model = make_stack(), tiny_llama()
    first = publisher_of(stack, database, tmp_path / "store", num_bytes=5)
    first.publish(model, 0)
    first.store.publish({"model.safetensors": b"x"}, version=1, step=1, state_checksum="")
    second = publisher_of(stack, database, tmp_path / "store", num_bytes=7)
    assert second.publish(model, 0) == 2
    assert sizes(database) == [5, 1, 7]
