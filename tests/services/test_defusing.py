"""Spellings of control tokens for endpoints without a tokenizer."""

import pytest

from services.defusing import JOINER, defused, restored
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
