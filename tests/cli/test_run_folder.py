"""Whose folder it is."""

from pathlib import Path

import pytest

from cli.run_folder import RunFolder, find_run
from shared.configuration import load_settings
from shared.errors import SettingsError
from shared.settings import Settings


def _settings(*overrides: str) -> Settings:
    return load_settings(None, ["--policy.model", "m", "--documents.path", "a.jsonl", *overrides], {})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.adopt(_settings())
    return folder


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("policy.model", "other", "policy.model was 'm' and is now 'other'"),
        ("documents.path", "b.jsonl", "documents.path was 'a.jsonl' and is now 'b.jsonl'"),
        ("documents.num_parts", "2", "documents.num_parts was 1 and is now 2"),
        ("chunks.suffix_tokens", "64", "chunks.suffix_tokens was 128 and is now 64"),
        ("run.seed", "7", "run.seed was 0 and is now 7"),
        ("trainer.objective", "rf_nll", "trainer.objective was 'dpo' and is now 'rf_nll'"),
    ],
)
def test_another_identity_is_refused_with_old_and_new(
    folder: RunFolder, option: str, value: str, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence):
        folder.adopt(_settings(f"--{option}", value))
    assert load_settings(folder.settings_file, environ={}) == _settings()


def test_other_settings_may_change_and_are_kept(folder: RunFolder) -> None:
    changed = _settings("--trainer.steps", "9", "--judge.port", "0", "--documents.max_epochs", "3")
    folder.adopt(changed)
    assert load_settings(folder.settings_file, environ={}) == changed


@pytest.mark.parametrize(
    ("now", "then"), [("max_windows_in_flight", "max_documents_in_flight"), ("from_step", "from_version")]
)
def test_a_run_of_an_earlier_version_is_refused_with_one_sentence(folder: RunFolder, now: str, then: str) -> None:
    """Its settings have names that this version does not know."""
    folder.settings_file.write_text(folder.settings_file.read_text().replace(now, then))
    sentence = "^run 'run' was begun by an earlier version of Headwater, .* start a new run with --run.name NAME$"
    with pytest.raises(SettingsError, match=sentence):
        folder.adopt(_settings())
    with pytest.raises(SettingsError, match=sentence):
        find_run(str(folder.path))


def test_a_secret_is_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for word in ("one", "two"):
        folder.adopt(_settings("--documents.path", f"https://me:{word}@host/a?sig={word}"))
    assert load_settings(folder.settings_file, environ={}).documents.path == "https://host/a"


def test_a_second_launcher_is_refused(folder: RunFolder) -> None:
    other = RunFolder(folder.path)
    with folder.locked(), pytest.raises(SettingsError, match="another `headwater run`"), other.locked():
        """Never reached."""
    with other.locked():
        """Free again."""


def test_a_run_is_found_by_folder_and_by_name(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, settings = find_run(str(folder.path))
    assert found == folder
    assert settings.database_url == f"sqlite:///{folder.path / 'headwater.db'}"
    (tmp_path / "runs").mkdir()
    folder.path.rename(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert find_run("mine")[1].database_url == "sqlite:///runs/mine/headwater.db"


def test_an_unknown_run_names_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no run .*settings\.toml"):
        find_run(str(tmp_path / "absent"))


def test_stores_of_its_own_are_reached_as_the_environment_says(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.adopt(_settings("--redis.url", "redis://:word@redis/0", "--database.url", "postgresql://me:word@db/runs"))
    here = {
        "HEADWATER_REDIS__URL": "redis://:word@127.0.0.1/0",
        "HEADWATER_DATABASE__URL": "postgresql://me:word@::1/r",
    }
    _, settings = find_run(str(folder.path), here)
    assert (settings.redis.url, settings.database.url) == tuple(here.values())
    _, settings = find_run(str(folder.path), {})
    assert (settings.redis.url, settings.database.url) == ("redis://redis/0", "postgresql://me@db/runs")


def test_embedded_stores_are_not_replaced_by_the_environment(folder: RunFolder) -> None:
    _, settings = find_run(str(folder.path), {"HEADWATER_REDIS__URL": "redis://elsewhere/0"})
    assert settings.redis.url == ""
