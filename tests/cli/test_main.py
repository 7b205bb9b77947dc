"""Usage and exit codes of the console script."""

from pathlib import Path

import pytest

from cli.main import build_parser, main


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "check", "init-model", "audit", "report"):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([command, "--help"])
        assert caught.value.code == 0
        assert f"usage: headwater {command}" in capsys.readouterr().out


def test_wrong_settings_end_with_2_and_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "absent.toml")]) == 2
    assert capsys.readouterr().err == f"headwater: no configuration file at {tmp_path / 'absent.toml'}\n"


def test_an_unknown_run_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path / "absent")]) == 2
    assert "no run" in capsys.readouterr().err


def test_options_of_a_command_without_settings_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["audit", "name", "--trainer.steps", "3"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --trainer.steps 3" in capsys.readouterr().err


def test_negative_values_reach_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.toml"
    config.write_text("")
    assert main(["run", str(config), "--trainer.beta", "-1"]) == 2
    assert "trainer.beta: Input should be greater than 0, got '-1'" in capsys.readouterr().err
