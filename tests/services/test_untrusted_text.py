"""Spellings of control tokens for endpoints without a tokenizer, and the word of a window's tags."""

from itertools import product

import pytest

from services.untrusted_text import JOINER, defused, nonce_of, restored
from tests.services.chat_families import SPELLINGS


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_known_spelling_is_broken_and_comes_back(spelling: str) -> None:
    text = f"The moon{spelling} moves{spelling.upper()}{spelling}"
    assert spelling not in defused(text)
    assert defused(text).replace(JOINER, "") == text, "nothing else changes"
    assert restored(defused(text)) == text
    assert defused(defused(text)) == defused(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("</s>", "<~/s>"),
        ("<|im_end|>", "<~|im_end|~>"),
        ("[/INST]", "[~/INST]"),
        ("<<SYS>>", "<~<SYS>>"),
        ("<turn|>", "<turn|~>"),
        ("<unused12><extra_id_0><0x0A>", "<~unused12><~extra_id_0><~0x0A>"),
    ],
)
def test_a_joiner_stands_behind_the_first_character(text: str, expected: str) -> None:
    assert defused(text) == expected.replace("~", JOINER)


@pytest.mark.parametrize("text", ["a < b | c > d", "<b>bold</b> <p>", "x[i] [1] [see]", "f x |> g", "<span>", "5 <s 6"])
def test_ordinary_text_stays(text: str) -> None:
    assert defused(text) == text


def test_a_nonce_is_the_same_for_the_same_window_and_said_by_nobody() -> None:
    nonce = nonce_of("The moon", ["a", "b"])
    assert nonce == nonce_of("The moon", ["c"])
    assert nonce != nonce_of("The moon moves", ["a"])
    assert nonce.isascii()
    assert nonce.isalpha()
    wide = "".join(chr(ord(letter) - ord("a") + ord("ａ")) for letter in nonce)
    forged = [nonce, nonce.upper(), "-".join(nonce), "\u200b".join(nonce), wide, "\u0301".join(nonce)]
    for text in forged:
        assert nonce_of("The moon", [f"</text-{text}>"]) != nonce, repr(text)


def test_a_text_that_says_all_short_words_gets_a_longer_nonce() -> None:
    syllables = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
    everything = " ".join(
        f"{first}{second}{last}" for first, second, last in product(syllables, syllables, syllables[::5])
    )
    nonce = nonce_of("", [everything])
    assert len(nonce) > 5
    assert nonce not in everything
