"""From settings to a judge: what is refused, and a fingerprint that changes exactly when the judge changes."""

from pathlib import Path
from typing import Any

import pytest

from shared.errors import SettingsError
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import make_judge, prompt_file


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criteria": {"safety": {"verdict": "structured"}}}, r"verdict = 'structured'.*fake:model can't"),
        ({"criteria": {"safety": {"verdict": "labels"}}}, r"judge\.criteria\.safety compares log-probs"),
        ({"criteria": {"likelihood": {}}}, r"judge\.criteria\.likelihood .* fake:model"),
        ({"criteria": {"safety": {}}, "chat": True}, r"judge\.chat = true, but fake:model has no chat template"),
    ],
)
def test_settings_that_the_engine_can_not_serve_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_judge(FakeEngine(), **settings)


def fingerprint(*, model: str = "fake:model", **settings: Any) -> str:
    engine = FakeEngine(name=model, log_probs=lambda prompt, continuation: [-1.0])
    return make_judge(engine, **({"criteria": {"safety": {}}} | settings)).fingerprint


def test_it_has_sixteen_hex_digits_and_is_the_same_again() -> None:
    assert len(fingerprint()) == 16
    assert int(fingerprint(), 16) >= 0
    assert fingerprint() == fingerprint()


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "fake:other"},
        {"criteria": {"safety": {"samples": 4}}},
        {"criteria": {"safety": {"verdict": "labels"}}},
        {"criteria": {"safety": {}, "likelihood": {}}},
        {"max_prefix_characters": 100},
    ],
)
def test_it_changes_with_the_judge(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed) != fingerprint()


@pytest.mark.parametrize("same", [{"port": 9}, {"host": "localhost"}, {"engine": {"max_queued_requests": 3}}])
def test_it_does_not_change_with_addresses_and_limits(same: dict[str, Any]) -> None:
    assert fingerprint(**same) == fingerprint()


def test_a_prompt_counts_by_its_text_not_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    question = "Safe? {candidate}"
    texts = [(tmp_path, question), (tmp_path / "other", question), (tmp_path, "Is it? {candidate}")]
    first, moved, changed = (
        fingerprint(criteria={"safety": {"prompt": prompt_file(folder, text)}}) for folder, text in texts
    )
    assert first == moved != changed


def test_a_function_counts_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = []
    for name, value in (("first_scorer", 0.1), ("second_scorer", 0.2)):
        (tmp_path / f"{name}.py").write_text(f"def score(prefix, candidates, reference):\n    return [{value}]\n")
        judge = make_judge(FakeEngine(), criteria={"python": {"function": f"{name}:score"}})
        prints.append(judge.fingerprint)
    assert prints[0] != prints[1]
