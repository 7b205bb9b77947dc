"""Where a value comes from, and what is said when it is wrong."""

from pathlib import Path

import pytest

from shared.configuration import load_secrets, load_settings, secret_variables, without_passwords, write_settings
from shared.errors import SettingsError
from shared.settings import Settings


def _toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_papers() -> None:
    settings = load_settings(None, environ={})
    assert (settings.trainer.steps, settings.trainer.pairs_per_step, settings.trainer.learning_rate) == (
        2000,
        256,
        5e-6,
    )
    assert (settings.chunks.context_tokens, settings.chunks.suffix_tokens) == (2048, 128)
    assert settings.collector.schedule[0].num_rollouts == 16


def test_command_line_wins_over_environment_wins_over_file(tmp_path: Path) -> None:
    path = _toml(tmp_path, "[trainer]\nsteps = 1\nwarmup_steps = 1\nbeta = 0.5\n")
    environ = {"HEADWATER_TRAINER__STEPS": "2", "HEADWATER_TRAINER__WARMUP_STEPS": "2"}
    trainer = load_settings(path, ["--trainer.steps", "3"], environ).trainer
    assert (trainer.steps, trainer.warmup_steps, trainer.beta) == (3, 2, 0.5)


def test_command_line_takes_equals_dashes_and_lists() -> None:
    schedule = '[{"kinds": ["original", "rollout"], "num_rollouts": 2}]'
    settings = load_settings(None, ["--trainer.pairs-per-step=4", "--collector.schedule", schedule], {})
    assert settings.trainer.pairs_per_step == 4
    assert settings.collector.schedule[0].num_rollouts == 2


def test_a_list_may_be_written_as_toml() -> None:
    settings = load_settings(
        None, ["--collector.schedule", '[{ kinds = ["original", "rewrite"], num_rollouts = 0 }]'], {}
    )
    assert settings.collector.schedule[0].kinds == ("original", "rewrite")


def test_an_unknown_key_in_the_file_is_named_with_its_file(tmp_path: Path) -> None:
    path = _toml(tmp_path, "[trainer]\nstep = 3\n")
    with pytest.raises(SettingsError, match=r"run\.toml: trainer\.step: no such setting"):
        load_settings(path, environ={})


TWO_REWRITES = ["--collector.schedule", '[{}, {"from_step": 5, "num_rewrites": 2}]']
ONLY_ORIGINALS = ["--collector.schedule", '[{"kinds": ["original"], "num_rollouts": 0}]']


@pytest.mark.parametrize(
    ("options", "environ", "said"),
    [
        ([], {"HEADWATER_TRAINER__STEP": "3"}, r"HEADWATER_TRAINER__STEP: no setting 'trainer\.step'.*steps"),
        (["--triner.steps", "3"], {}, r"no setting 'triner'.*trainer"),
        (["--rollout.engine", "vllm"], {}, r"rollout\.engine is a section"),
        (["--trainer.beta", "-1"], {}, r"command line --trainer\.beta: trainer\.beta: .*greater than 0, got '-1'"),
        (["--trainer.objective", "sft_rewrite", *ONLY_ORIGINALS], {}, r"needs candidates of kind \['rewrite'\]"),
        (ONLY_ORIGINALS, {}, "at least two candidates"),
        (["--chunks.context_tokens", "100"], {}, "no chunk would ever fit"),
        (
            TWO_REWRITES,
            {},
            r"step 5 has num_rewrites = 2, but rewriter\.temperature = 0 makes them all equal",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(options: list[str], environ: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(None, options, environ)


@pytest.mark.parametrize("words", [["--trainer.steps"], ["trainer.steps", "3"], ["--steps", "3"]])
def test_a_malformed_command_line_is_an_error(words: list[str]) -> None:
    with pytest.raises(SettingsError):
        load_settings(None, words, {})


def test_several_rewrites_of_a_suffix_are_sampled() -> None:
    settings = load_settings(None, [*TWO_REWRITES, "--rewriter.temperature", "0.7"], {})
    assert settings.collector.stage_at(5).num_candidates == 19


def test_every_wrong_value_is_reported() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, ["--trainer.beta", "-1", "--trainer.steps", "many"], {})
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no configuration file"):
        load_settings(tmp_path / "absent.toml", environ={})


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="line 1"):
        load_settings(_toml(tmp_path, "[trainer\n"), environ={})


def test_settings_written_and_read_again_are_the_same(tmp_path: Path) -> None:
    settings = load_settings(None, ["--judge.criteria", '{"safety": {"weight": 2.0}}', "--run.name", "a"], {})
    write_settings(settings, tmp_path / "settings.toml")
    assert load_settings(tmp_path / "settings.toml", environ={}) == settings


def test_secrets_come_from_the_environment_and_are_no_settings() -> None:
    environ = {"HEADWATER_TOKEN": "a"}
    assert load_settings(None, environ=environ) == Settings()
    assert load_secrets(environ).token == "a"


def test_the_stage_in_force_is_the_last_that_has_begun() -> None:
    schedule = '[{"kinds": ["original","rewrite"], "num_rollouts": 0}, {"from_step": 5, "num_rollouts": 4}]'
    collector = load_settings(None, ["--collector.schedule", schedule], {}).collector
    assert [collector.stage_at(step).num_rollouts for step in (0, 4, 5, 9)] == [0, 0, 4, 4]


BFLOAT16 = ["--weights.dtype", "bfloat16"]


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--weights.push_every", "18"], "lower push_every to 17, or raise max_policy_lag to 17"),
        ([*BFLOAT16, "--weights.full_every", "17"], "lower full_every to 16, or raise max_policy_lag to 17"),
        ([*BFLOAT16, "--weights.push_every", "2"], "lower full_every to 8, or raise max_policy_lag to 20"),
    ],
)
def test_weights_that_are_always_stale_are_refused_with_the_remedy(options: list[str], remedy: str) -> None:
    with pytest.raises(SettingsError, match=remedy):
        load_settings(None, options, {})


@pytest.mark.parametrize(
    "options",
    [
        ["--weights.push_every", "17"],
        ["--weights.full_every", "1000"],  # in float32 all are full
        [*BFLOAT16, "--weights.full_every", "16"],
        [*BFLOAT16, "--weights.full_every", "1", "--weights.push_every", "17"],
    ],
)
def test_weights_within_the_lag_are_not(options: list[str]) -> None:
    load_settings(None, options, {})


SECRET_URLS = {
    "documents.path": "https://me:hUsh@host/a?sig=hUsh#hUsh",
    "redis.url": "rediss://me:hUsh@redis:6379/0?password=hUsh",
    "database.url": "postgresql://me:hUsh@a:1,b:2/runs?sslpassword=hUsh",
    "weights.store": "s3://hUsh:hUsh@bucket/run?token=hUsh",
    "rollout.url": "http://hUsh@a:1/,http://hUsh@b:2/",
    "rewriter.engine.endpoint": "https://hUsh@host/v1?api_key=hUsh",
    "judge.url": "http://me:hUsh@host/#hUsh",
    "judge.engine.endpoint": "http://me:hUsh@host/v1",
}


def test_what_is_kept_has_no_secret_and_the_environment_has_the_rest(tmp_path: Path) -> None:
    settings = load_settings(None, [f"--{name}={url}" for name, url in SECRET_URLS.items()], {})
    write_settings(without_passwords(settings), tmp_path / "settings.toml")
    assert "hUsh" not in (tmp_path / "settings.toml").read_text()
    variables = secret_variables(settings)
    assert variables == {f"HEADWATER_{name.upper().replace('.', '__')}": url for name, url in SECRET_URLS.items()}
    assert load_settings(tmp_path / "settings.toml", environ=variables) == settings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--redis.url=redis://:a@hUsh@redis/0"], "command line --redis.url: redis.url: Value error, it is no URL"),
        (["--redis.url", "me:hUsh@redis"], "it must begin with redis:// or rediss:// or unix://"),
        (["--judge.url", "http://me:a/hUsh@host"], "it is no URL that can be read with certainty: write the special"),
        (["--judge.engine.endpoint", "hUsh@host"], "it must begin with http:// or https://"),
        (["--database.url", '["postgresql://me:hUsh@host"]'], "valid string, got ['postgresql://me@host']"),
        (["--redis.address=redis://:hUsh@redis"], "command line --redis.address: no setting"),
        (["redis://:hUsh@redis"], "expected --section.key VALUE, got 'redis://redis'"),
        (["--documents.path", "[redis://:hUsh@redis"], "neither JSON nor TOML"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_without_its_secret(options: list[str], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(None, options, {})
    assert said in str(caught.value)
    assert "hUsh" not in str(caught.value)
