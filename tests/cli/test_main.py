"""The command line, through the installed `headwater` script: usage, exit codes, signals, closed pipes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cli.main import commands, split_overrides
from tests.cli.conftest import MadeRun

ROOT = Path(__file__).parents[2]
HEADWATER = Path(sys.executable).with_name("headwater")
WAIT_S = 60.0


def headwater(*words: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | (environ or {})
    return subprocess.run([HEADWATER, *words], capture_output=True, text=True, timeout=WAIT_S, env=environment)


def test_the_version_is_told() -> None:
    answer = headwater("--version")
    assert (answer.returncode, answer.stdout) == (0, "headwater 0.1.0\n")


def test_help_and_docs_have_every_command() -> None:
    names = [name for name, _ in commands()]
    assert {"run", "check", "prepare", "init-model", "audit", "report", "demo", "sweep", "swap-judge"} | {
        "judge-audit",
        "judge-compare",
    } == set(names)
    shown = headwater("--help").stdout
    assert [name for name in names if not re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE)] == []
    documented = re.findall(r"^## `headwater ([a-z-]+)", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(names)


def test_every_command_has_help() -> None:
    for name, text in commands():
        answer = headwater(name, "-h")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.startswith(f"Usage: headwater {name} [OPTIONS]")
        assert text.split()[0] in answer.stdout


def test_a_completion_script_is_shown_and_completes() -> None:
    script = headwater("--show-completion", "bash", environ={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"})
    assert "complete -o default -F _headwater_completion headwater" in script.stdout
    words = {"_HEADWATER_COMPLETE": "complete_bash", "COMP_WORDS": "headwater au", "COMP_CWORD": "1"}
    assert headwater(environ=words).stdout.split() == ["audit"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "Missing command."),
        ("aduit NAME", "No such command 'aduit'. Did you mean 'audit'?"),
        ("audit NAME --jsno", "No such option: --jsno (Possible options: --json)"),
        ("audit", "Missing argument 'RUN'."),
        ("run a.toml b.toml", "Got unexpected extra argument(s) (b.toml)"),
        ("audit NAME --trainer.steps 3", "audit takes no settings: remove --trainer.steps."),
        (
            "audit absent-run",
            "no run 'absent-run': there is no absent-run/settings.toml or runs/absent-run/settings.toml",
        ),
        ("audit NAME --redis.url=redis://:hUsh@a", "audit takes no settings: remove --redis.url=redis://a."),
        ("run a.toml redis://:hUsh@a", "Got unexpected extra argument(s) (redis://a)"),
        ("run absent.toml", "no configuration file at absent.toml"),
        ("prepare configs/local.toml --trainer.steps", "--trainer.steps needs a value"),
        ("check configs/local.toml --trainer.stesp 3", "command line --trainer.stesp: no setting 'trainer.stesp'"),
    ],
)
def test_wrong_usage_and_settings_end_with_2_and_one_sentence(line: str, sentence: str) -> None:
    answer = headwater(*line.split())
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith(f"headwater: {sentence}")
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "line",
    [
        "check {} --trainer.beta -1 --trainer.steps=0",
        "check --trainer.beta -1 {} --trainer.steps=0",
        "--trainer.steps 0 check --trainer.beta=-1 {}",
    ],
)
def test_overrides_may_stand_anywhere(line: str) -> None:
    answer = headwater(*line.format(ROOT / "configs/local.toml").split())
    assert answer.returncode == 2
    assert "trainer.beta: Input should be greater than 0, got '-1'" in answer.stderr
    assert "trainer.steps: Input should be greater than or equal to 1, got '0'" in answer.stderr


def test_overrides_are_told_from_other_words() -> None:
    words = ["--a.b", "-1", "run", "x.toml", "--json", "--c-d.e={\n}", "--f.g.h", "--i", "--no-dot=a.b"]
    assert split_overrides(words) == (
        ["--a.b", "-1", "--c-d.e={\n}", "--f.g.h", "--i"],
        ["run", "x.toml", "--json", "--no-dot=a.b"],
    )


def test_what_fails_ends_with_1(made: MadeRun) -> None:
    answer = headwater("report", str(made.folder.path))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == "headwater: run made has taken no step yet: nothing to report\n"


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = headwater("prepare", str(ROOT / "configs/local.toml"), "--run.directory", str(tmp_path / "file"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("headwater: ")
    assert str(tmp_path / "file") in answer.stderr


def test_a_closed_pipe_ends_the_command_quietly(made: MadeRun) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run(
        [HEADWATER, "audit", made.folder.path], stdout=writing, stderr=subprocess.PIPE, timeout=WAIT_S, check=False
    )
    os.close(writing)
    assert (answer.returncode, answer.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_the_command_quietly(made: MadeRun, number: int, code: int) -> None:
    """It waits for a settings file that nobody writes."""
    fifo = made.folder.path / "fifo.toml"
    os.mkfifo(fifo)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    process = subprocess.Popen([HEADWATER, "prepare", fifo], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    with fifo.open("wb"):  # opens when the command reads
        process.send_signal(number)
        output = process.communicate(timeout=WAIT_S)
    assert (process.returncode, output) == (code, (b"", b""))
