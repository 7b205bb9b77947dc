"""Reading verdicts from hand-made answers, and hand-computed expectations."""

import math
import re

import pytest

from services.engine.base import TokenSequence, WordOdds
from services.judge.questions import QUESTIONS
from services.judge.reading import (
    Written,
    answer_pattern,
    check_labels,
    end_of_thoughts,
    find_verdict,
    gradable_words,
    graded_value,
    is_whole,
    label_expectation,
    read_verdict,
)
from shared.errors import SettingsError
from tests.services.fakes import FakeEngine

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
        "Verdict: A/B",
        "Verdict: tie-break",
    ],
)
def test_what_can_not_be_told_is_no_verdict(answer: str) -> None:
    assert read_verdict(answer, VERDICTS) is None


def test_grades_of_hallucination_have_their_values() -> None:
    grades = QUESTIONS["factuality"].verdicts
    assert [read_verdict(f"Verdict: {word}", grades) for word in ("none", "Possible", "definite")] == [1.0, 0.5, 0.0]


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


def test_a_verdict_has_its_place_in_the_answer() -> None:
    assert find_verdict("Fine.\nVerdict: **Tie**", VERDICTS) == Written("tie", start=17)


GRADES = {"A": 1.0, "A-": 0.8, "10": 0.6, "1": 0.2}


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Verdict: A", 1.0),
        ("Verdict: A-", 0.8),
        ("Verdict: 10", 0.6),
        ("Verdict: 1.", 0.2),
        ("Verdict: 1.5", None),
        ("Verdict: 1/10", None),
        ("Verdict: A-level", None),
        ("Verdict: 100", None),
    ],
)
def test_words_that_begin_alike_are_told_apart(answer: str, value: float | None) -> None:
    assert read_verdict(answer, GRADES) == value


@pytest.mark.parametrize(
    ("answer", "thinking_end", "begin"),
    [
        ("Verdict: A", "</think>", 0),
        ("<think>B?</think>Verdict: A", "</think>", 17),
        ("<think>B?</think> no </think>Verdict: A", "</think>", 29),
        ("B?</think>A", "</think>", 10),
        (" \n<think>Verdict: B", "</think>", None),
        ("I <think> so. Verdict: A", "</think>", 0),
        ("[THINK]Verdict: B", "[/THINK]", None),
        ("<think>Verdict: B", "", 0),
    ],
)
def test_an_answer_begins_behind_its_thoughts(answer: str, thinking_end: str, begin: int | None) -> None:
    assert end_of_thoughts(answer, thinking_end) == begin


def test_a_verdict_in_the_thoughts_is_none() -> None:
    answer = "<think>Verdict: B</think>I can't tell."
    assert find_verdict(answer, VERDICTS, begin=answer.index("I can")) is None


@pytest.mark.parametrize(
    ("answer", "whole"),
    [("So.\nVerdict: A-", True), ("So.\nVerdict: A", False), ("So.\nVerdict: 10", True), ("So", False)],
)
def test_a_structured_answer_that_was_cut_is_whole_if_no_longer_word_could_follow(answer: str, whole: bool) -> None:
    _, pattern = answer_pattern(GRADES, max_characters=10)
    assert is_whole(answer, pattern, GRADES) == whole


class Cutting(FakeEngine):
    """With a token of its own for every run of letters, and for a space before one."""

    table = (" A", " B", " t", "-", "A", "ie", " un", "safe", " safe", " ")

    def encode_content(self, text: str) -> list[int]:
        ids = []
        while text:
            token = next(token for token in self.table if text.startswith(token))
            ids.append(self.table.index(token))
            text = text[len(token) :]
        return ids

    def decode(self, token_ids: TokenSequence) -> str:
        (token_id,) = token_ids
        return self.table[token_id]


@pytest.mark.parametrize(
    ("verdicts", "has_tokenizer", "words"),
    [
        ({"A": 1.0, "B": 0.0, "tie": 0.5}, True, {"A": 1.0, "B": 0.0, "tie": 0.5, "Tie": 0.5}),
        ({"A": 1.0, "A-": 0.0}, True, {}),
        ({"safe": 1.0, "unsafe": 0.0}, True, {"safe": 1.0, "Safe": 1.0, "unsafe": 0.0, "Unsafe": 0.0}),
        ({"A": 1.0, "B": 0.0}, False, {"A": 1.0, "B": 0.0}),
        ({"possible": 1.0, "positive": 0.0}, False, {}),
    ],
)
def test_only_words_with_different_first_tokens_are_graded(
    verdicts: dict[str, float], has_tokenizer: bool, words: dict[str, float]
) -> None:
    assert gradable_words(verdicts, Cutting(has_tokenizer=has_tokenizer)) == words


def test_a_space_of_its_own_is_no_first_token() -> None:
    """The fake's tokens are bytes: " safe" begins with a space, as " unsafe" does."""
    assert set(gradable_words({"safe": 1.0, "unsafe": 0.0}, FakeEngine())) == {"safe", "Safe", "unsafe", "Unsafe"}


def test_a_grade_is_the_expectation_where_the_verdict_stands() -> None:
    """p = 0.6 A, 0.2 B, 0.1 tie: (0.6 + 0.5 * 0.1) / 0.9."""
    odds = (WordOdds(3, (0.0, -9.0, -9.0)), WordOdds(20, (math.log(0.6), math.log(0.2), math.log(0.1))))
    assert graded_value(odds, 20, (1.0, 0.0, 0.5)) == pytest.approx(0.65 / 0.9)
    assert graded_value(odds, 19, (1.0, 0.0, 0.5)) is None
    assert graded_value((WordOdds(0, (-math.inf,) * 2),), 0, (1.0, 0.0)) is None
    assert graded_value((WordOdds(0, (-0.1, -math.inf)),), 0, (1.0, 0.0)) == 1.0


def test_a_label_must_not_begin_another() -> None:
    check_labels((" A", " B", " tie"))
    with pytest.raises(SettingsError, match="label ' A' is the beginning of ' A-'"):
        check_labels((" A-", " A"))
