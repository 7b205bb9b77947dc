"""Cutting rewrites in the policy's tokens, by tokenizers of both common kinds."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import SentencePieceBPETokenizer
from transformers import PreTrainedTokenizerFast

from services.rewriter.rewriter import PolicyTokens
from services.tokenizer import TokenCodec, load_tokenizer


@pytest.fixture(scope="module")
def byte_level(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model), setting="policy.model")


@pytest.fixture(scope="module")
def sentence_piece() -> Any:
    bpe = SentencePieceBPETokenizer()
    bpe.train_from_iterator(
        ["the moon moves around the earth"] * 3, vocab_size=100, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, unk_token="<unk>", eos_token="</s>")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("text", [" the moon", "moon moves", "the earth"])
def test_a_leading_space_is_kept_and_none_is_added(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    cut = PolicyTokens(TokenCodec(tokenizer)).cut(text, 100)
    assert (cut.text, cut.is_whole) == (text, True)
    colon = tokenizer.encode(":", add_special_tokens=False)
    continued = tokenizer.decode([*colon, *cut.token_ids], clean_up_tokenization_spaces=False)
    assert continued.endswith(text)


def test_the_text_is_what_the_kept_tokens_say(byte_level: Any) -> None:
    cut = PolicyTokens(TokenCodec(byte_level)).cut(" Earth moves", 3)
    assert len(cut.token_ids) == 3
    assert cut.text == byte_level.decode(list(cut.token_ids))
    assert not cut.is_whole


def test_a_character_cut_in_half_is_left_out_of_the_text_only(byte_level: Any) -> None:
    """In this small vocabulary the two bytes of ï are two tokens."""
    cut = PolicyTokens(TokenCodec(byte_level)).cut("naïve", 3)
    assert (len(cut.token_ids), cut.text) == (3, "na")


def test_a_special_token_spelled_out_is_text(byte_level: Any) -> None:
    cut = PolicyTokens(TokenCodec(byte_level)).cut("a<|end|>b", 100)
    assert byte_level.eos_token_id not in cut.token_ids
    assert cut.text == "a<|end|>b"
