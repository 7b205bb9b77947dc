"""The tokenizer: any text survives, every world word is one token, nothing is added."""

import pytest
from transformers import PreTrainedTokenizerFast

from starter.documents import document_of
from starter.grammar import split_words
from starter.model import WordCodec
from starter.world import World


@pytest.mark.parametrize(
    "text",
    ["Héllo wörld", "  two  spaces \n\n\t and tabs\r\n", "日本語 🙂 {braces} </tag>", "Mara is", "x" * 300, "end "],
)
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_world_word_and_every_label_is_one_token(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    words = [*world.words(), "A", "B", "safe", "unsafe", "none", "possible", "definite"]
    assert [word for word in words if len(tokenizer.encode(f" {word}")) != 1] == []


def test_words_their_text_and_all_windows_have_the_same_ids(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    document = document_of(world, "train", 0)
    ids = tokenizer.encode(document.text)
    assert ids == WordCodec(tokenizer).ids(document.words, starts_document=True)
    assert split_words(document.text) == list(document.words)
    for start in range(96):
        window = ids[start : start + 32]
        assert tokenizer.encode(tokenizer.decode(window)) == window


def test_nothing_is_added_and_the_vocabulary_is_small(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("") == []
    assert len(tokenizer) <= 1024
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
