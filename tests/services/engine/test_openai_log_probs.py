"""Scores and verdict odds from listed log-probs."""

import json
import math

import pytest

from services.engine.openai.answers import Choice, read_answer
from services.engine.openai.log_probs import all_listed, read_label_scores, read_word_odds
from shared.errors import PromptError


def logs(**shares: float) -> dict[str, float]:
    """Log-probs of shares; `_` at the beginning of a name is a space."""
    return {name.replace("_", " "): math.log(share) for name, share in shares.items()}


def shares(top: dict[str, float], *labels: str) -> list[float]:
    return [math.exp(value) for (value,) in read_label_scores(top, labels, name="endpoint")]


def test_a_label_counts_with_and_without_its_leading_space() -> None:
    assert shares(logs(A=0.5, _A=0.2, _B=0.1), " A", " B") == pytest.approx([0.7, 0.1])


def test_a_label_that_is_not_listed_is_no_likelier_than_the_last_one_listed() -> None:
    assert shares(logs(_A=0.6, the=0.05, a=0.02), " A", " B") == pytest.approx([0.6, 0.02])


def test_nor_likelier_than_what_the_listed_ones_leave() -> None:
    assert shares(logs(_A=0.97), " A", " B") == pytest.approx([0.97, 0.03])
    assert shares({" A": 0.0}, " A", " B") == pytest.approx([1.0, 1e-6])


def test_without_any_label_listed_there_is_no_score() -> None:
    with pytest.raises(PromptError, match=r"none of ' A', ' B' is told by the 1 likeliest"):
        shares(logs(the=0.9), " A", " B")


def test_a_label_of_several_tokens_counts_by_its_first_one() -> None:
    """`unsafe` is never listed whole here: bounded as unlisted it would be a certain "safe"."""
    assert shares(logs(_un=0.6, _safe=0.3, saf=0.05), " safe", " unsafe") == pytest.approx([0.35, 0.6])


def test_a_beginning_that_several_labels_share_tells_nothing() -> None:
    with pytest.raises(PromptError, match="no score"):
        shares(logs(un=0.9, uns=0.05), "unsafe", "unsure")
    assert shares(logs(A=0.6, AB=0.3), "A", "AB") == pytest.approx([0.6, 0.3]), "a whole word is itself"


@pytest.mark.parametrize("label", [[5], "no opinion", ""])
def test_only_words_are_labels(label: str | list[int]) -> None:
    with pytest.raises(PromptError, match="labels of one word only"):
        read_label_scores(logs(A=0.5), ["A", label], name="endpoint")


def test_all_are_listed_only_if_each_is_one_token() -> None:
    top = logs(A=0.5, _B=0.2, un=0.2)
    assert all_listed(top, [" A", " B"])
    assert not all_listed(top, [" A", " unsafe"])
    assert not all_listed(top, [" A", [3]])


def chat_answer(text: str, tokens: list[str], top: dict[str, float], *, with_bytes: bool = True) -> Choice:
    listed = [{"token": token, "logprob": value} for token, value in top.items()]
    content = [
        {"token": token, "logprob": -9, "bytes": list(token.encode()) if with_bytes else None, "top_logprobs": listed}
        for token in tokens
    ]
    choice = {"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": content}}
    (found,) = read_answer(json.dumps({"choices": [choice]}))
    return found


TOP = logs(_A=0.6, _B=0.3)


@pytest.mark.parametrize(
    ("text", "tokens", "starts"),
    [
        ("Verdict: A", ["Ver", "dict", ":", " A"], [9]),
        ("Verdict: A", ["<think>", "A", "</think>", "\n", "Verdict", ":", " A", "<|im_end|>"], [9]),
        ("é🌙: A.", ["é", "🌙", ":", " A", "."], [4]),
        ("B or A", ["B", " or", " A"], [0, 5]),
        ('"A"', ['"A', '"'], [1]),
        ("A", ["\n\nA"], [0]),
        ("Another", [" A", "nother"], []),
        ("Verdict: A", ["Something", " else"], []),
        ("", ["A"], []),
    ],
)
def test_odds_stand_where_a_whole_word_is_written(text: str, tokens: list[str], starts: list[int]) -> None:
    """Thoughts and special tokens around the text are skipped; tokens that do not spell it give no odds."""
    for with_bytes in (True, False):
        found = read_word_odds(chat_answer(text, tokens, TOP, with_bytes=with_bytes), ["A", "B", "tie"])
        assert [odds.start for odds in found] == starts
        for odds in found:
            a, b, tie = odds.log_probs
            assert math.exp(b) == pytest.approx(0.3, abs=1e-3)
            assert tie == -math.inf, "it is not listed"
            assert math.exp(a) >= 0.6


def test_bytes_decide_where_a_tokens_text_is_half_a_character() -> None:
    content = [
        {"token": token, "bytes": spelling, "logprob": -1, "top_logprobs": [{"token": " A", "logprob": -0.5}]}
        for token, spelling in (("\\xc3", [0xC3]), ("\\xa9", [0xA9]), (" A", [32, 65]))
    ]
    answer = {"choices": [{"message": {"content": "é A"}, "logprobs": {"content": content}}]}
    (odds,) = read_word_odds(read_answer(json.dumps(answer))[0], ["A", "B"])
    assert (odds.start, odds.log_probs) == (2, (-0.5, -math.inf))


def test_the_completions_route_lists_them_in_its_own_form() -> None:
    logprobs = {"tokens": ["so", " A"], "token_logprobs": [-1.0, -0.5], "top_logprobs": [None, {" B": -2.0}]}
    answer = {"choices": [{"text": "so A", "logprobs": logprobs}]}
    (odds,) = read_word_odds(read_answer(json.dumps(answer))[0], ["A", "B"])
    assert odds.log_probs == (-0.5, -2.0)
