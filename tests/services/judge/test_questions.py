"""Every shipped prompt loads, and says what the method needs it to say."""

from pathlib import Path
from typing import Any

import pytest

from services.judge.questions import PROMPTS, QUESTIONS, load_prompt, question_of
from services.judge.reading import read_verdict
from shared.errors import SettingsError
from shared.judge_settings import CriterionSettings

NAMES = list(QUESTIONS)


def test_there_is_a_prompt_for_each_kind_of_verdict_and_no_other() -> None:
    expected = {f"{name}{kind}.txt" for name in NAMES for kind in ("", "_labels")}
    assert {path.name for path in PROMPTS.iterdir()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_prompt_names_every_verdict_as_it_is_read(name: str) -> None:
    text = load_prompt(name, CriterionSettings(), QUESTIONS[name]).text
    for word, value in QUESTIONS[name].verdicts.items():
        assert f"Verdict: {word}" in text
        assert read_verdict(f"Verdict: {word}", QUESTIONS[name].verdicts) == value


@pytest.mark.parametrize("name", NAMES)
def test_a_label_prompt_ends_where_the_label_comes(name: str) -> None:
    text = load_prompt(name, CriterionSettings(verdict="labels"), QUESTIONS[name]).text
    assert text.endswith("\nVerdict:")
    assert all(label in text for label in QUESTIONS[name].labels)


@pytest.mark.parametrize("name", NAMES)
def test_an_echo_of_the_whole_instruction_is_read_as_no_preference_of_the_judge(name: str) -> None:
    """A model that repeats the list of verdicts on one line has decided nothing."""
    assert read_verdict("Verdict: " + "|".join(QUESTIONS[name].verdicts), QUESTIONS[name].verdicts) is None


def test_a_question_of_the_users_own_is_settings_alone() -> None:
    criterion = CriterionSettings(kind="pointwise", prompt=Path("style.txt"), verdicts={"plain": 1.0, "ornate": 0.25})
    question = question_of("style", "pointwise", criterion)
    assert question is not None
    assert (question.labels, question.is_pairwise) == ((" plain", " ornate"), False)
    assert question.verdicts == {"plain": 1.0, "ornate": 0.25}


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("tone", {}, r"judge\.criteria\.mine\.kind: no criterion is called 'tone'; known are quality, "),
        ("pointwise", {"verdicts": {"yes": 1, "no": 0}}, r"judge\.criteria\.mine\.prompt is missing"),
        ("pointwise", {"prompt": "p.txt"}, r"judge\.criteria\.mine\.verdicts needs at least two words"),
        ("quality", {"verdicts": {"A": 1, "B": 1}}, r"at least two words of different value"),
        ("quality", {"verdicts": {"++": 1, "--": 0}}, r"must begin with letters or digits"),
        ("quality", {"verdicts": {"yes": 1, "Yes": 0}}, r"differ by more than case"),
    ],
)
def test_an_incomplete_question_is_refused(kind: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        question_of("mine", kind, CriterionSettings.model_validate(given))
