"""A run made ready for processes that are started one by one."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from cli.prepare import prepare
from cli.run_folder import find_run
from shared.database import RunRow, open_database, transaction
from shared.errors import SettingsError


def _prepare(folder: Path, *overrides: str) -> int:
    config = folder / "run.toml"
    config.write_text('[run]\nname = "made"\n[policy]\nmodel = "m"\n')
    return prepare(config, ["--run.directory", str(folder), *overrides])


def test_folder_schema_and_row_are_there_after_it_without_a_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _prepare(tmp_path, "--redis.url", "redis://:hidden-word@redis:6379/0") == 0
    folder, settings = find_run(str(tmp_path / "made"))
    database = open_database(settings.database_url)
    with transaction(database) as session:
        row = session.scalars(sa.select(RunRow)).one()
        assert (row.id, row.settings["redis"]["url"]) == ("made", "redis://redis:6379/0")
    database.dispose()
    assert "hidden-word" not in folder.settings_file.read_text()
    assert "run made is prepared" in capsys.readouterr().out


def test_again_it_takes_new_steps_and_refuses_another_identity(tmp_path: Path) -> None:
    _prepare(tmp_path)
    assert _prepare(tmp_path, "--trainer.steps", "7") == 0
    assert find_run(str(tmp_path / "made"))[1].trainer.steps == 7
    with pytest.raises(SettingsError, match=r"run\.seed was 0 and is now 3"):
        _prepare(tmp_path, "--run.seed", "3")
