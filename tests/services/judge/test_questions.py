"""Every shipped prompt loads, and says what the method needs it to say."""

import pytest

from services.judge.questions import PROMPTS, QUESTIONS, load_prompt
from services.judge.reading import read_verdict
from shared.judge_settings import CriterionName, CriterionSettings

NAMES: list[CriterionName] = list(QUESTIONS)


def test_there_is_a_prompt_for_each_kind_of_verdict_and_no_other() -> None:
    expected = {f"{name}{kind}.txt" for name in NAMES for kind in ("", "_labels")}
    assert {path.name for path in PROMPTS.iterdir()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_prompt_names_every_verdict_as_it_is_read(name: CriterionName) -> None:
    text = load_prompt(name, CriterionSettings()).text
    for word, value in QUESTIONS[name].verdicts.items():
        assert f"Verdict: {word}" in text
        assert read_verdict(f"Verdict: {word}", QUESTIONS[name].verdicts) == value


@pytest.mark.parametrize("name", NAMES)
def test_a_label_prompt_ends_where_the_label_comes(name: CriterionName) -> None:
    text = load_prompt(name, CriterionSettings(verdict="labels")).text
    assert text.endswith("\nVerdict:")
    assert all(label in text for label in QUESTIONS[name].labels)


@pytest.mark.parametrize("name", NAMES)
def test_an_echo_of_the_whole_instruction_is_read_as_no_preference_of_the_judge(name: CriterionName) -> None:
    """A model that repeats the list of verdicts on one line has decided nothing."""
    assert read_verdict("Verdict: " + "|".join(QUESTIONS[name].verdicts), QUESTIONS[name].verdicts) is None
