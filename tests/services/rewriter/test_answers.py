"""Which answers of a teacher are no rewrites, by how they begin."""

from pathlib import Path
from typing import Any

import pytest

from services.engine.base import Generation
from services.rewriter.answers import AnswerReader, Passage, PolicyTokens, repeats, without_thoughts
from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import RewriteItem
from shared.engine_settings import RewriterSettings

PREFIX = "It is said that the Moon moves around the"


@pytest.fixture(scope="module")
def tokens(tiny_model: Path) -> PolicyTokens:
    return PolicyTokens(TokenCodec(load_tokenizer(str(tiny_model), setting="policy.model")))


def read(
    tokens: PolicyTokens, answer: str, suffix: str = " Earth in 70 days.", *, length: bool = False, **engine: Any
) -> str:
    """The rewrite, or why there is none."""
    settings = RewriterSettings.model_validate({"engine": engine})
    reader = AnswerReader(settings, tokens, ends_with_bridge=True, chat=True)
    item = RewriteItem(start=0, end=1, max_suffix_tokens=64)
    passage = Passage(PREFIX, suffix, "around the", item)
    found = reader.read(Generation((), answer, "length" if length else "stop", 0), passage)
    assert (found.text == "") == (found.token_ids == ()) == bool(found.refusal)
    return found.refusal or found.text


@pytest.mark.parametrize(
    "answer",
    [
        "Here is the rewritten passage:\n\naround the Earth in 27 days.",
        "**Here's** a better version: around the Earth",
        "around the Sure, this is it: Earth in 27 days.",
        "“Certainly! around the Earth",
        "## Rewritten passage\naround the Earth",
    ],
)
def test_an_answer_that_announces_the_rewrite_is_none(tokens: PolicyTokens, answer: str) -> None:
    assert read(tokens, answer) == "preamble"


@pytest.mark.parametrize(
    ("answer", "suffix"),
    [
        (" Surely it is.", " Maybe it is."),
        (" Here is the Earth.", " Here is the Eart."),
        (" sure thing.", " Sure thing."),
        (" As an AIDS researcher", " He said"),
    ],
)
def test_a_text_that_only_looks_like_a_preamble_is_a_rewrite(tokens: PolicyTokens, answer: str, suffix: str) -> None:
    assert read(tokens, answer, suffix) == answer


@pytest.mark.parametrize(
    "answer",
    [
        "the Moon moves around the Earth in 27 days.",
        "It is said that the Moon moves around the Earth.",
        "around the\nIT IS SAID that the  Moon moves around the Earth.",
    ],
)
def test_an_answer_that_says_the_prefix_again_is_none(tokens: PolicyTokens, answer: str) -> None:
    assert read(tokens, answer) == "repeats_prefix"


def test_the_bridge_itself_is_no_repetition(tokens: PolicyTokens) -> None:
    assert read(tokens, "around the Earth in 27 days.") == " Earth in 27 days."


PART = "the quick brown fox jumps over the lazy dog and then runs away"


@pytest.mark.parametrize(
    ("prefix", "text", "suffix", "found"),
    [
        (f"He wrote: {PART}. More text.", f" {PART}.", " something", True),
        (f"He wrote: {PART}. More text.", " the quick brown fox sleeps.", " something", False),
        (f"He wrote: {PART}. More text.", f" {PART}.", f" {PART}", False),
        ("and so on, and so on,", " and so on, and so on, on", " and so forth", True),
        ("and so on,", " and so on, and so on", " and so forth", False),
        ("", " and so on, and so on", " and so forth", False),
        ("月は地球のまわりを約二十七日で一周します", "月は地球のまわりを約二十七日で一周します。水は", "水は", True),
    ],
)
def test_what_counts_as_saying_the_prefix_again(prefix: str, text: str, suffix: str, found: bool) -> None:
    """The end of the prefix from 16 characters on, any part of it from 60 on; never what the suffix says too."""
    assert repeats(prefix, text, suffix=suffix) == found


@pytest.mark.parametrize(
    ("answer", "end", "suffix", "rest"),
    [
        ("<think>Hm. around the</think>\n\naround the Earth", "</think>", "x", "around the Earth"),
        ("Hm.</think>a</think> Earth", "</think>", "x", "Earth"),
        ("<think>Hm, around the", "</think>", "x", None),
        (" Earth", "</think>", "x", " Earth"),
        ("<think> Earth", "", "x", "<think> Earth"),
        ("Hm.[end]Earth", "[end]", "x", "Earth"),
        ("[end] Earth", "[end]", "ends with [end]", "[end] Earth"),
        ("Hm.</think>a </think> b", "</think>", "a </think> b", "a </think> b"),
        ("<think> is a tag", "</think>", " <think> is a tag", "<think> is a tag"),
    ],
)
def test_thoughts_are_cut_off(answer: str, end: str, suffix: str, rest: str | None) -> None:
    """Those that the suffix itself shows stay."""
    assert without_thoughts(answer, end, suffix=suffix) == rest


def test_a_thought_is_no_rewrite(tokens: PolicyTokens) -> None:
    assert read(tokens, "<think>The user wants") == "thought"
    assert read(tokens, "<think>The user wants", length=True) == "thought"
    assert read(tokens, "<think>Fine.</think>around the Earth.") == " Earth."
    assert read(tokens, "<think>Fine.</think>Earth.") == " Earth."
    assert read(tokens, "<<Fine.>>around the Earth.", thinking_end=">>") == " Earth."
