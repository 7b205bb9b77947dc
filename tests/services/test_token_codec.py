"""Loading and comparing tokenizers."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from services.tokenizer import Shown, TokenCodec, beginning_of_text, load_tokenizer, same_tokens
from shared.errors import SettingsError


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model), setting="policy.model")


def test_a_tokenizer_is_the_same_as_itself_loaded_again(tokenizer: Any, tiny_model: Path) -> None:
    assert same_tokens(tokenizer, load_tokenizer(str(tiny_model), setting="policy.model"))


def test_one_more_token_makes_another_tokenizer(tokenizer: Any, tiny_model: Path) -> None:
    other = load_tokenizer(str(tiny_model), setting="policy.model")
    other.add_tokens(["moon"])
    assert not same_tokens(tokenizer, other)


def test_only_a_tokenizer_that_begins_its_texts_has_a_beginning(tokenizer: Any) -> None:
    assert beginning_of_text(tokenizer) is None
    tokenizer.bos_token = "<|end|>"
    assert beginning_of_text(tokenizer) is None
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    assert beginning_of_text(tokenizer) == 0


@pytest.mark.parametrize(("source", "message"), [("", "policy.model is empty"), ("/nowhere/at/all", "can be loaded")])
def test_a_missing_tokenizer_names_the_setting(source: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_tokenizer(source, setting="policy.model")


END = 0
"""The tiny tokenizer's end-of-text."""


@pytest.fixture
def codec(tokenizer: Any) -> TokenCodec:
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


def test_the_unknown_token_is_text_unless_it_also_ends_texts(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    unknown = tokenizer.unk_token_id
    assert TokenCodec(tokenizer).continuation([40], [unknown, 40]).text.startswith("<unk>")
    tokenizer.unk_token = "<|end|>"
    assert TokenCodec(tokenizer).continuation([40], [END, 40]).flaw == "control_token"
