"""Where long texts are cut: block borders that stay, words and characters that stay whole."""

import random

import pytest

from services.text_cuts import blocks_of, cut_prefix, next_cut

WORDS = " ".join(random.Random(0).choices(["moon", "a", "river", "boils", "mountains", "the"], k=4000))
FAMILY, FLAGS, ACCENTED, HINDI = "👩‍👩‍👧‍👦", "🇯🇵🇹🇭", "e\u0301", "क्षि"


@pytest.mark.parametrize("max_characters", [40, 333, 8000])
def test_a_cut_prefix_keeps_to_its_bounds(max_characters: int) -> None:
    for end in range(0, len(WORDS), 97):
        found = cut_prefix(WORDS, end, max_characters)
        assert WORDS[:end].endswith(found)
        assert len(found) <= max_characters
        assert len(found) >= min(end, 0.68 * max_characters)


def test_chunks_of_a_document_begin_alike() -> None:
    starts = [end - len(cut_prefix(WORDS, end, 8000)) for end in range(8000, 16_001, 200)]
    assert sorted(set(starts)) == sorted(set(starts), key=starts.index)
    assert len(set(starts)) == 5, "the whole prefix, then one start for each 2,000 characters"
    assert all(WORDS[start] == " " for start in starts[1:]), "before a word's space"


@pytest.mark.parametrize(("text", "end", "most", "expected"), [
    ("abcdef", 6, 6, "abcdef"), ("abcdef", 4, 9, "abcd"), ("abcdef", 6, 0, ""), ("abcdef", 0, 5, ""),
    ("abcdef", 5, 3, "cde"), ("abcdef", 6, 1, "f"),
])  # fmt: skip
def test_short_prefixes(text: str, end: int, most: int, expected: str) -> None:
    assert cut_prefix(text, end, most) == expected


@pytest.mark.parametrize("cluster", [FAMILY, "🇯🇵", "👍🏽", ACCENTED, HINDI, "\r\n", "a\u0301\u0302\u0303"])
def test_a_cut_never_lies_inside_a_character(cluster: str) -> None:
    text = cluster * 30
    for place in range(1, len(text) - len(cluster)):
        assert next_cut(text, place, at_most=0) % len(cluster) == 0


def test_endless_clusters_are_cut_all_the_same() -> None:
    assert next_cut("e" + "\u0301" * 1000, 500, at_most=32) == 500


@pytest.mark.parametrize("text", ["", WORDS, "[" * 5000, FAMILY * 300, " " * 3000])
def test_blocks_are_the_text(text: str) -> None:
    blocks = blocks_of(text, 700)
    assert "".join(blocks) == text
    assert all(0 < len(block) <= 700 + 64 for block in blocks)
