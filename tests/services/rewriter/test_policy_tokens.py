"""Cutting rewrites in the policy's tokens, by tokenizers of both common kinds."""

from pathlib import Path

import pytest

from services.rewriter.answers import PolicyTokens
from services.tokenizer import TokenCodec, load_tokenizer
from tests.services.subject_tokenizers import save_tokenizer, sentence_piece_bpe


@pytest.fixture(scope="module")
def byte_level(tiny_model: Path) -> TokenCodec:
    return TokenCodec(load_tokenizer(str(tiny_model), setting="policy.model"))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> TokenCodec:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(sentence_piece_bpe(), folder)
    return TokenCodec(load_tokenizer(str(folder), setting="policy.model"))


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("text", [" the moon", "moon moves", "the earth"])
def test_a_leading_space_is_kept_and_none_is_added(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    codec = request.getfixturevalue(kind)
    cut = PolicyTokens(codec).cut(text, 100)
    assert (cut.text, cut.is_whole) == (text, True)
    assert codec.decode([*codec.encode(":"), *cut.token_ids]) == f":{text}"


def test_the_text_is_what_the_kept_tokens_say(byte_level: TokenCodec) -> None:
    cut = PolicyTokens(byte_level).cut(" Earth moves", 3)
    assert (len(cut.token_ids), cut.is_whole) == (3, False)
    assert cut.text == byte_level.decode(cut.token_ids)


def test_a_character_cut_in_half_is_left_out_of_the_text_only(byte_level: TokenCodec) -> None:
    """In this small vocabulary the two bytes of ï are two tokens."""
    cut = PolicyTokens(byte_level).cut("naïve", 3)
    assert (len(cut.token_ids), cut.text) == (3, "na")


def test_a_special_token_spelled_out_is_text(byte_level: TokenCodec) -> None:
    cut = PolicyTokens(byte_level).cut("a<|end|>b", 100)
    assert byte_level.end not in cut.token_ids
    assert cut.text == "a<|end|>b"
