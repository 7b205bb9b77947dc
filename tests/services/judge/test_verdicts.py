"""Reading verdicts, by hand-made answers and hand-computed expectations."""

import math
import re

import pytest

from services.judge.verdicts import (
    FACTUALITY_VERDICTS,
    QUALITY_VERDICTS,
    answer_pattern,
    label_expectation,
    read_verdict,
)


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
    assert read_verdict(answer, QUALITY_VERDICTS) == value


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
    assert read_verdict(answer, QUALITY_VERDICTS) is None


def test_grades_of_hallucination_have_their_values() -> None:
    read = [read_verdict(f"Verdict: {word}", FACTUALITY_VERDICTS) for word in ("none", "Possible", "definite")]
    assert read == [1.0, 0.5, 0.0]


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
    max_tokens, pattern = answer_pattern(QUALITY_VERDICTS, max_characters=10)
    assert max_tokens == 4 * 10 + len("\nVerdict: tie")
    assert (re.fullmatch(pattern, answer) is not None) == fits
    assert not fits or read_verdict(answer, QUALITY_VERDICTS) is not None


def test_labels_are_weighed_by_their_probability() -> None:
    """p = 0.6, 0.3, 0.1 of the labels' mass: 0.6 * 1 + 0.3 * 0.5 + 0.1 * 0 = 0.75."""
    log_probs = [[math.log(0.06)], [math.log(0.03)], [math.log(0.1), math.log(0.1)]]
    assert label_expectation(log_probs, (1.0, 0.5, 0.0)) == pytest.approx(0.75)


def test_tiny_probabilities_do_not_underflow() -> None:
    assert label_expectation([[-5000.0], [-5000.0]], (1.0, 0.0)) == 0.5


@pytest.mark.parametrize("log_probs", [[[-math.inf], [-math.inf]], [[math.nan], [-1.0]]])
def test_labels_without_probability_are_no_verdict(log_probs: list[list[float]]) -> None:
    assert label_expectation(log_probs, (1.0, 0.0)) is None
