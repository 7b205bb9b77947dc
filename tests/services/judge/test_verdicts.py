"""Asking for verdicts and reading them, by hand-made answers and hand-computed expectations."""

import math
import re

import pytest

from services.judge.questions import QUESTIONS
from services.judge.reading import answer_pattern, label_expectation, read_verdict
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import answering, judged, make_window

VERDICTS = QUESTIONS["quality"].verdicts


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("A flows better.\nVerdict: A", 1.0),
        ("**Verdict:** B.", 0.0),
        ("Verdict: [[Tie]]", 0.5),
        ('**Verdict**: "a"', 1.0),
        ("VERDICT:\n\n**b**", 0.0),
        ("First I thought Verdict: A. But no.\nVerdict: B", 0.0),
        ("Verdict: B (it is a much better text)", 0.0),
    ],
)
def test_the_last_verdict_is_read(answer: str, value: float) -> None:
    assert read_verdict(answer, VERDICTS) == value


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "A is better.",
        "Verdict:",
        "Verdict: neither",
        "Verdict: A good text would go on",
        "Verdict: A or B",
        "Verdict: A|B|tie",
        "Verdict: A\nVerdict: C",
        "Verdict: Best is B",
    ],
)
def test_what_can_not_be_told_is_no_verdict(answer: str) -> None:
    assert read_verdict(answer, VERDICTS) is None


def test_grades_of_hallucination_have_their_values() -> None:
    grades = QUESTIONS["factuality"].verdicts
    assert [read_verdict(f"Verdict: {word}", grades) for word in ("none", "Possible", "definite")] == [1.0, 0.5, 0.0]


def test_an_unreadable_verdict_is_asked_again_with_a_new_seed() -> None:
    """Two of three answers can't be read: two are asked for again, and the mean is over three verdicts."""
    answers = iter(["hm", "Verdict: safe", "Verdict: maybe", "Verdict: unsafe", "Verdict: safe"])
    engine = FakeEngine(answer=lambda prompt, index: next(answers))
    judgement = judged(engine, make_window(" x", " x"), criteria={"safety": {"samples": 3}}, max_retries=1)
    assert judgement.rewards == pytest.approx((2 / 3, 2 / 3))
    assert (judgement.num_calls, judgement.num_failures) == (5, 2)
    assert [sampling.num_samples for sampling in engine.samplings] == [3, 2]
    assert engine.samplings[0].seed != engine.samplings[1].seed


def test_sampling_follows_the_settings() -> None:
    engine = answering("Verdict: safe")
    criterion = {"samples": 2, "temperature": 0.3, "top_p": 0.9, "max_answer_tokens": 7}
    judged(engine, make_window(" x", " x"), criteria={"safety": criterion})
    asked = engine.samplings[0]
    assert (asked.num_samples, asked.temperature, asked.top_p, asked.max_tokens) == (2, 0.3, 0.9, 7)


def test_a_structured_verdict_is_asked_for_with_a_pattern_and_room_for_it() -> None:
    """32 characters of 4 bytes at most, then the longest last line: 128 + len("\\nVerdict: unsafe")."""
    engine = answering("So.\nVerdict: safe", can_constrain=True)
    criteria = {"safety": {"samples": 2, "verdict": "structured", "max_answer_tokens": 8}}
    assert judged(engine, make_window(" x", " y"), criteria=criteria).rewards == (1.0, 1.0)
    assert {sampling.max_tokens for sampling in engine.samplings} == {128 + 16}
    (pattern,) = {sampling.pattern for sampling in engine.samplings}
    assert re.fullmatch(pattern, "So.\nVerdict: safe")
    assert not re.fullmatch(pattern, "So.")


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ("Verdict: A", True),
        ("Good.\nVerdict: tie", True),
        ("A\nnd so\nVerdict: B", True),
        ("Verdict: A\nVerdict: B", True),
        ("This is more than ten.\nVerdict: A", False),
        ("Good. Verdict: A", False),
        ("Verdict: A.", False),
        ("Good.\nVerdict: both", False),
        ("Good.", False),
    ],
)
def test_a_structured_answer_ends_in_a_line_with_a_verdict(answer: str, fits: bool) -> None:
    max_tokens, pattern = answer_pattern(VERDICTS, max_characters=10)
    assert max_tokens == 4 * 10 + len("\nVerdict: tie")
    assert (re.fullmatch(pattern, answer) is not None) == fits
    assert not fits or read_verdict(answer, VERDICTS) is not None


def test_labels_are_weighed_by_their_probability() -> None:
    """p = 0.6, 0.3, 0.1 of the labels' mass: 0.6 * 1 + 0.3 * 0.5 + 0.1 * 0 = 0.75."""
    log_probs = [[math.log(0.06)], [math.log(0.03)], [math.log(0.1), math.log(0.1)]]
    assert label_expectation(log_probs, (1.0, 0.5, 0.0)) == pytest.approx(0.75)


def test_tiny_probabilities_do_not_underflow() -> None:
    assert label_expectation([[-5000.0], [-5000.0]], (1.0, 0.0)) == 0.5


@pytest.mark.parametrize("log_probs", [[[-math.inf], [-math.inf]], [[math.nan], [-1.0]]])
def test_labels_without_probability_are_no_verdict(log_probs: list[list[float]]) -> None:
    assert label_expectation(log_probs, (1.0, 0.0)) is None
