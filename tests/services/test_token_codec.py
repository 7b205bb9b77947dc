"""Loading and comparing tokenizers."""

from pathlib import Path
from typing import Any

import pytest

from services.tokenizer import Shown, TokenCodec, Tokenizer, load_tokenizer, same_tokens
from shared.errors import SettingsError
from tests.services.subject_tokenizers import BOS, EOS, SPECIALS, UNKNOWN, byte_level, save_tokenizer, word_level


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_model), setting="policy.model")


def make_tokenizer(core: Any, folder: Path, **options: Any) -> Tokenizer:
    save_tokenizer(core, folder, **options)
    return load_tokenizer(str(folder), setting="policy.model")


def test_one_more_token_makes_another_tokenizer(tmp_path: Path) -> None:
    core = byte_level(adds_bos=False)
    first, again = make_tokenizer(core, tmp_path / "1"), make_tokenizer(core, tmp_path / "2")
    core.add_tokens(["moon"])
    assert same_tokens(first, again)
    assert not same_tokens(first, make_tokenizer(core, tmp_path / "3"))


def test_only_a_tokenizer_that_begins_its_texts_has_a_beginning(tmp_path: Path) -> None:
    assert make_tokenizer(byte_level(adds_bos=False), tmp_path / "1").beginning is None
    core = byte_level(adds_bos=True)
    assert make_tokenizer(core, tmp_path / "2").beginning == core.token_to_id(BOS)
    assert make_tokenizer(core, tmp_path / "3", bos_token=EOS).beginning is None


@pytest.mark.parametrize(("source", "message"), [("", "policy.model is empty"), ("/nowhere/at/all", "can be loaded")])
def test_a_missing_tokenizer_names_the_setting(source: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_tokenizer(source, setting="policy.model")


END = 0
"""The tiny tokenizer's end-of-text."""


@pytest.fixture
def codec(tokenizer: Tokenizer) -> TokenCodec:
    return TokenCodec(tokenizer)


def test_what_ids_say_is_trimmed_by_a_character_at_either_end(codec: TokenCodec) -> None:
    first, second = codec.encode("é")
    moon = codec.encode(" moon ")
    assert codec.continuation([first], [second, *moon, first]) == Shown(" moon ", "")
    assert codec.continuation([first], [second]) == Shown("", "")
    assert codec.continuation([], codec.encode("\ufffd moon \ufffd")) == Shown("\ufffd moon \ufffd", "")


def test_broken_bytes_are_no_text(codec: TokenCodec) -> None:
    """Forty halves of characters were once shown as nothing."""
    first, second = codec.encode("é")
    said = codec.encode(" the cat sat")
    assert codec.continuation(codec.encode("a"), [second] * 40 + said).flaw == "broken_text"
    assert codec.continuation(codec.encode("a"), [*said, first, *said]).flaw == "broken_text"
    assert codec.continuation([first], said).flaw == "broken_text", "it does not complete the character"
    assert codec.continuation(codec.encode("a"), [*said, first, END]).flaw == "broken_text", "nothing cut it"


def test_only_a_last_end_of_text_is_hidden(codec: TokenCodec) -> None:
    a, b = codec.encode("a"), codec.encode("b")
    assert codec.continuation(a, [*b, END]) == Shown("b", "")
    assert codec.continuation(a, [END]) == Shown("", "")
    assert codec.continuation(a, [*b, END, *b]) == Shown("bb", "control_token")
    assert codec.continuation(a, [*b, END, END]).flaw == "control_token"
    assert codec.continuation(a, [*b, 5000]).flaw == "control_token", "no token of this tokenizer"
    assert codec.continuation(a, [*a, *b], ends=b) == Shown("a", ""), "the model's own end"


def test_the_unknown_token_is_text_unless_it_also_ends_texts(tmp_path: Path) -> None:
    unknown = SPECIALS.index(UNKNOWN)
    codec = TokenCodec(make_tokenizer(word_level(), tmp_path / "1"))
    assert codec.continuation([40], [unknown, 40]).text.strip().startswith(UNKNOWN)
    codec = TokenCodec(make_tokenizer(word_level(), tmp_path / "2", eos_token=UNKNOWN))
    assert codec.continuation([40], [unknown, 40]).flaw == "control_token"
