"""`headwater check` finds every problem at once, and writes nothing."""

import json
from pathlib import Path

import pytest

from cli.check import check
from shared.configuration import load_settings
from shared.database import migrate, open_database
from shared.identity import Manifest
from shared.runs import open_run
from tests.cli.launched import write_model
from tests.services.engine.scripted_endpoint import Endpoint, serving

CONFIG = Path(__file__).parent.parent.parent / "configs" / "real-text.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    (folder / "documents.jsonl").write_text(json.dumps({"text": "the sea and the hills"}) + "\n")
    write_model(folder, context=256)
    return folder


def _words(folder: Path) -> list[str]:
    words = ["--run.directory", str(folder / "runs"), "--documents.path", str(folder / "documents.jsonl")]
    return [*words, "--policy.model", str(folder / "model"), "--judge.engine.model", str(folder / "model")]


def _check(folder: Path, *options: str) -> int:
    return check(CONFIG, [*_words(folder), *options])


def test_a_good_configuration_says_what_would_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _check(folder) == 0
    text = capsys.readouterr().out
    assert "would start 5 processes" in text
    assert "'the sea and the hills'" in text
    assert " NO " not in text
    assert not (folder / "runs").exists()


def test_every_problem_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "--policy.model": str(folder / "absent"),
        "--documents.path": str(folder / "absent.jsonl"),
        "--redis.url": "redis://127.0.0.1:1/0",
        "--database.url": "postgresql://127.0.0.1:1/x?connect_timeout=2",
        "--judge.url": "http://127.0.0.1:1",
        "--rollout.engine.kind": "vllm",
    }
    assert _check(folder, *[word for option in options.items() for word in option]) == 1
    text = capsys.readouterr().out
    assert "6 problems:" in text
    for place in ("policy.model", "documents", "redis", "database", "judge", "rollout.engine"):
        assert f"  - {place}: " in text


def test_no_secret_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "--documents.path": "https://me:hUsh@127.0.0.1:1/a?sig=hUsh",
        "--redis.url": "redis://:hUsh@127.0.0.1:1/0",
        "--database.url": "postgresql://me:hUsh@127.0.0.1:1/x?connect_timeout=2&sslpassword=hUsh",
        "--weights.store": "s3://id:hUsh@bucket",
        "--judge.url": "http://me:hUsh@127.0.0.1:1/?key=hUsh",
        "--rewriter.engine.kind": "openai",
        "--rewriter.engine.endpoint": "http://me:hUsh@127.0.0.1:1/v1#hUsh",
        "--rollout.engine.model": "https://me:hUsh@127.0.0.1:1/m",
    }
    assert _check(folder, *[word for option in options.items() for word in option]) == 1
    output = capsys.readouterr()
    assert "hUsh" not in output.out + output.err
    for place in ("documents", "redis", "database", "weights.store", "judge"):
        assert f"  NO   {place}" in output.out


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--chunks.context_tokens", "512", "room for 256 tokens, chunks.context_tokens is 512"),
        ("--documents.text_field", "body", "the first record is refused (no_text_field)"),
    ],
)
def test_what_does_not_fit_is_a_problem(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, problem: str
) -> None:
    assert _check(folder, option, value) == 1
    assert problem in capsys.readouterr().out


def test_what_an_endpoint_can_do_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = Endpoint(ignores_n=True, patterned="123")
    with serving(endpoint) as url:
        options = {"kind": "openai", "endpoint": f"{url}/v1", "model": "policy"}
        words = [word for name, value in options.items() for word in (f"--judge.engine.{name}", value)]
        assert _check(folder, *words) == 0
        assert "no n, seed, temperature, 2 top log-probs, patterns; bound by max_tokens" in capsys.readouterr().out
        endpoint.status, endpoint.num_failures, endpoint.error = 403, 99, {"message": "no credit"}
        assert _check(folder, *words) == 1
    assert "judge.engine: openai:policy@" in capsys.readouterr().out


def test_a_prompt_without_its_placeholder_is_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prompt.txt").write_text("Which one?")
    criteria = json.dumps({"quality": {"prompt": str(folder / "prompt.txt")}})
    assert _check(folder, "--judge.criteria", criteria) == 1
    assert "judge.criteria" in capsys.readouterr().out


def test_damaged_weights_are_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = folder / "damaged"
    teacher.mkdir()
    (teacher / "config.json").write_text((folder / "model" / "config.json").read_text())
    (teacher / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes()[:1000])
    assert _check(folder, "--judge.engine.model", str(teacher)) == 1
    assert "is damaged" in capsys.readouterr().out


def test_documents_and_settings_of_a_run_in_the_database_are_compared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.jsonl").write_text('{"text": "the sea"}')
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    options = ["--documents.path", str(documents), "--database.url", url, "--run.name", "known"]
    settings = load_settings(CONFIG, [*_words(folder), *options])
    engine = open_database(url)
    migrate(engine)
    assert _check(folder, *options) == 0, "it does not have the run"
    run = open_run(settings)
    run.adopt_source(Manifest({"a.jsonl": 19}))
    assert _check(folder, *options) == 0
    (documents / "b.jsonl").write_text('{"text": "the hills"}')
    assert _check(folder, *options) == 1
    assert "1 file was added (b.jsonl)" in capsys.readouterr().out
    assert _check(folder, *options, "--documents.num_parts", "2") == 1
    assert "documents.num_parts was 1 and is now 2" in capsys.readouterr().out
    engine.dispose()
