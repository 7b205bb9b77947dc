"""Loading and comparing tokenizers."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from services.tokenizer import beginning_of_text, load_tokenizer, same_tokens
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
