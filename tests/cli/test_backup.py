"""Backup and restore as docs/operating.md has them: a run whose stores are lost goes on from its backup, and the audit
holds. Once with the database in the run folder, once with PostgreSQL."""

import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from shared.database import StepRow, open_database, transaction
from shared.errors import DatabaseError
from tests.cli.launched import Launched, Recipe
from tests.cli.test_run import NEXT_TOKEN, recipe
from tests.shared.conftest import database_url, postgres_url

__all__ = ["database_url", "postgres_url", "recipe"]  # fixtures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 16


class Operator:
    """What the page tells a person to do."""

    def __init__(self, recipe: Recipe, database_url: str, backup: Path) -> None:
        self._recipe = recipe
        self._url = database_url
        self._backup = backup
        self._dump = backup / "headwater.dump"
        backup.mkdir()

    def back_up(self) -> None:
        """The run is stopped. Redis and weights are left out: nobody needs them."""
        left_out = shutil.ignore_patterns("redis", "weights", "replicas", "logs")
        shutil.copytree(self._recipe.run_folder, self._backup / "run", ignore=left_out)
        if self._url.startswith("sqlite"):
            shutil.copy(self._database_file, self._dump)
        else:
            _postgres("pg_dump", "--format=custom", f"--file={self._dump}", f"--dbname={self._url}")

    def lose_everything(self) -> None:
        shutil.rmtree(self._recipe.run_folder)
        if self._url.startswith("sqlite"):
            self._database_file.unlink()

    def restore(self) -> None:
        shutil.copytree(self._backup / "run", self._recipe.run_folder)
        if self._url.startswith("sqlite"):
            shutil.copy(self._dump, self._database_file)
        else:
            _postgres("pg_restore", "--clean", "--if-exists", f"--dbname={self._url}", str(self._dump))

    def steps(self) -> list[int]:
        engine = open_database(self._url)
        try:
            with transaction(engine) as session:
                return list(session.scalars(sa.select(StepRow.step).order_by(StepRow.step)))
        except DatabaseError:  # not migrated yet
            return []
        finally:
            engine.dispose()

    @property
    def _database_file(self) -> Path:
        return Path(self._url.removeprefix("sqlite:///"))


def _postgres(program: str, *arguments: str) -> None:
    import pgserver

    folder = Path(pgserver.__file__).parent / "pginstall" / "bin"
    answer = subprocess.run(
        [str(folder / program), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr


def run_until(operator: Operator, recipe: Recipe, step: int, options: Sequence[str]) -> None:
    """Start the run, and stop it calmly at `step` or soon after."""
    with Launched(recipe, [*options, "--trainer.steps", "5000"]) as run:
        run.wait_until(lambda: max(operator.steps(), default=0) >= step, what=f"step {step}")
        run.signal(signal.SIGINT)
        assert run.finish() == 128 + signal.SIGINT, run.output


def test_a_run_that_lost_its_stores_goes_on_from_its_backup(recipe: Recipe, database_url: str, tmp_path: Path) -> None:
    operator = Operator(recipe, database_url, tmp_path / "backup")
    options = (*NEXT_TOKEN, "--database.url", database_url)
    run_until(operator, recipe, 5, options)
    operator.back_up()
    saved = max(operator.steps())
    run_until(operator, recipe, saved + 5, options)
    operator.lose_everything()

    operator.restore()
    assert max(operator.steps()) == saved
    with Launched(recipe, [*options, "--trainer.steps", str(saved + STEPS)]) as run:
        assert run.finish() == 0, run.output
    assert operator.steps() == list(range(1, saved + STEPS + 1))
    result = recipe.audit()
    assert result.holds, result
    assert result.balance.trained > 0
