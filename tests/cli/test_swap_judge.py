"""Swapping the judge, with the compose stack played at its seam; tests/compose does it for real."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cli.swap_judge import VARIABLE, ComposeError, ComposeStack, Part, keep_variable, mounted_path, swap_in, swap_judge
from shared.errors import SettingsError

OLD = Part("old", "running", 0, 0, "/stack/configs/old.toml", {"ready": True, "fingerprint": "aaaa", "model": "small"})


def _new(
    *, status: str = "running", exit_code: int = 0, num_restarts: int = 0, readiness: Mapping[str, object] | None = None
) -> Part:
    return Part("new", status, exit_code, num_restarts, "/stack/configs/new.toml", readiness or {})


READY = _new(readiness={"ready": True, "fingerprint": "bbbb", "model": "large"})


class PlayedStack(ComposeStack):
    """Shows one list of judges after another; the last one stays."""

    def __init__(self, folder: Path, *looks: list[Part], fails: bool = False) -> None:
        self.folder, self.project, self._env_files = folder, "played", []
        self._looks = list(looks)
        self._fails = fails
        self.made_with: Mapping[str, str] = {}

    def parts(self, service: str, *, ready_url: str) -> list[Part]:
        assert (service, ready_url) == ("judge", "http://127.0.0.1:8003/readyz")
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]

    def recreate(self, service: str, environ: Mapping[str, str], *, timeout_s: float) -> None:
        if self._fails:
            raise ComposeError("no space left on device")
        self.made_with = environ

    def log(self, service: str, *, lines: int = 12) -> list[str]:
        return ["12:00 error no such model"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.swap_judge.LOOK_EVERY_S", 0.0)


def _ticking() -> Iterator[float]:
    yield from range(1000)


def test_it_waits_for_the_new_judge_and_tells_both_fingerprints(tmp_path: Path) -> None:
    stack = PlayedStack(tmp_path, [OLD], [OLD], [_new()], [READY])
    lines = swap_in(stack, "./configs/new.toml", timeout_s=60)
    assert stack.made_with == {VARIABLE: "./configs/new.toml"}
    assert stack.env_file.read_text() == "STACK_JUDGE_CONFIG='./configs/new.toml'\n"
    assert "  fingerprint  aaaa -> bbbb" in lines
    assert "  model        small -> large" in lines


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        (_new(status="exited", exit_code=1), "it ended with exit status 1 before it was ready"),
        (_new(num_restarts=2), "has been restarted 2 times"),
    ],
)
def test_a_judge_that_ends_is_told_at_once_with_its_log_and_the_way_back(
    tmp_path: Path, judge: Part, sentence: str
) -> None:
    with pytest.raises(ComposeError) as caught:
        swap_in(PlayedStack(tmp_path, [OLD], [judge]), "./configs/new.toml", timeout_s=60)
    assert sentence in str(caught.value)
    assert "headwater swap-judge /stack/configs/old.toml --project played" in str(caught.value)
    assert "12:00 error no such model" in str(caught.value)


def test_a_judge_that_never_becomes_ready_ends_the_wait(tmp_path: Path) -> None:
    clock = _ticking()
    with pytest.raises(ComposeError, match="did not become ready within 60 s"):
        swap_in(PlayedStack(tmp_path, [OLD], [_new()]), "./new.toml", timeout_s=60, clock=lambda: next(clock))


def test_where_compose_fails_the_old_settings_are_kept(tmp_path: Path) -> None:
    stack = PlayedStack(tmp_path, [OLD], fails=True)
    with pytest.raises(ComposeError, match="no space left"):
        swap_in(stack, "./new.toml", timeout_s=60)
    assert not stack.env_file.exists()


def test_a_stack_without_a_judge_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(ComposeError, match="docker compose up -d judge"):
        swap_in(PlayedStack(tmp_path, []), "./new.toml", timeout_s=60)


def test_settings_with_a_mistake_never_reach_the_stack(tmp_path: Path) -> None:
    settings = tmp_path / "judge.toml"
    settings.write_text("[judge]\nmax_retires = 2\n")
    with pytest.raises(SettingsError, match=r"judge\.max_retires: no such setting"):
        swap_judge(settings, project="absent", timeout=1)


def test_the_other_lines_of_the_env_file_stay(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("# mine\nHEADWATER_TOKEN=abc\nSTACK_JUDGE_CONFIG=./old.toml\nSTACK_RUN=one\n")
    keep_variable(env, VARIABLE, "./new one.toml")
    assert env.read_text() == "# mine\nHEADWATER_TOKEN=abc\nSTACK_RUN=one\nSTACK_JUDGE_CONFIG='./new one.toml'\n"
    assert env.stat().st_mode & 0o777 == 0o600


def test_paths_are_written_as_compose_reads_them(tmp_path: Path) -> None:
    project = tmp_path / "project"
    assert mounted_path(project / "configs" / "new.toml", project) == "./configs/new.toml"
    assert mounted_path(tmp_path / "else.toml", project) == str(tmp_path / "else.toml")
    with pytest.raises(SettingsError, match="without : '"):
        mounted_path(project / "a:b.toml", project)
