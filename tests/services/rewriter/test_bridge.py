"""The bridge between prefix and rewrite."""

import pytest

from services.rewriter.bridge import continued, joined_like, last_words, looked_at, without_bridge


@pytest.mark.parametrize(
    ("prefix", "num_words", "bridge"),
    [
        ("one two three", 2, "two three"),
        ("one\n two  three ", 2, "two  three "),
        ("one", 5, "one"),
        ("one two", 0, ""),
        ("  ", 5, ""),
        ("", 5, ""),
    ],
)
def test_the_bridge_is_the_end_of_the_prefix_as_it_stands(prefix: str, num_words: int, bridge: str) -> None:
    assert last_words(prefix, num_words) == bridge
    assert prefix.endswith(bridge)


@pytest.mark.parametrize(
    ("prefix", "bridge"),
    [
        ("月は地球のまわりを" * 40, ("月は地球のまわりを" * 2)[2:]),
        ("a" * 7 + "e\u0301" * 8, "e\u0301" * 8),
        ("x" * 15 + "e\u0301" * 8 + "z", "e\u0301" * 7 + "z"),
        ("x" * 20 + "👩\u200d👩\u200d👧" + "y" * 12, "y" * 12),
        ("x" * 20 + "🇯🇵🇹🇭" + "y" * 13, "🇹🇭" + "y" * 13),
        ("x" * 20 + "👍🏽" + "y" * 15, "y" * 15),
        ("น้ำ" * 20, "น้ำ" * 5),
        ("x" * 20 + "न्दी" + "y" * 13, "y" * 13),
        ("some very-long-hyphenated-words here", "here"),
        ("one" + " " * 40, ""),
    ],
)
def test_a_bridge_of_two_words_has_at_most_sixteen_characters_all_of_them_whole(prefix: str, bridge: str) -> None:
    assert last_words(prefix, 2) == bridge
    assert last_words(prefix[-looked_at(2) :], 2) == bridge, "no more of the prefix is looked at"


def test_an_answer_in_japanese_may_begin_with_the_bridge() -> None:
    bridge = last_words("月は地球のまわりを約二十七日でまわる。水は高い山では", 2)
    assert without_bridge(f"{bridge}低い温度で沸く。", bridge, suffix="低い温度で") == "低い温度で沸く。"


@pytest.mark.parametrize(
    ("answer", "bridge", "suffix", "rest"),
    [
        ("around the Earth.", "around the", " Earth", " Earth."),
        ("  around\nthe\nEarth.", "around the", " Earth", "\nEarth."),
        ("around the, well", "around the", " Earth", ", well"),
        ("around the  Earth", "around the ", "Earth", "Earth"),
        ("the Moon is", "the Moo", "n is", "n is"),
        ("thereby", "there", " he", None),
        ("Earth.", "around the", " Earth", None),
        (" Earth", "", " Earth", None),
    ],
)
def test_the_bridge_is_taken_off_the_answer(answer: str, bridge: str, suffix: str, rest: str | None) -> None:
    assert without_bridge(answer, bridge, suffix=suffix) == rest


def test_braces_and_patterns_in_the_bridge_are_text() -> None:
    assert without_bridge("f(x) = {a}.* yes", "f(x) = {a}.*", suffix=" yes") == " yes"


@pytest.mark.parametrize(
    ("answer", "suffix", "joined"),
    [
        ("Earth", " Moon", " Earth"),
        ("\n Earth", "\n\nMoon", "\n\nEarth"),
        (" Earth", "Moon", "Earth"),
        (" \n", " x", ""),
    ],
)
def test_an_answer_without_bridge_begins_like_the_suffix(answer: str, suffix: str, joined: str) -> None:
    assert joined_like(answer, suffix) == joined


@pytest.mark.parametrize(
    ("answer", "bridge", "suffix", "text"),
    [
        (" Earth", "the", " Moon", " Earth"),
        ("Earth", "the", " Moon", " Earth"),
        (" Earth", "the ", "Moon", "Earth"),
        (", well", "the", " Moon", ", well"),
        ("n is", "the Moo", "n was", "n is"),
    ],
)
def test_a_continued_bridge_keeps_one_space_at_the_border(answer: str, bridge: str, suffix: str, text: str) -> None:
    assert continued(answer, bridge=bridge, suffix=suffix) == text
