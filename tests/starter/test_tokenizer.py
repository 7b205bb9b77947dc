"""The tokenizer: any text and back, every world word one token, nothing added on its own."""

import pytest
from transformers import PreTrainedTokenizerFast

from services.prompts import Prompt
from starter.prompts import PROMPT_FOLDER, PromptLayout, prompt_text
from starter.tokenizer import WordCodec, build_tokenizer
from starter.world import World
from starter.writer import document_of


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return build_tokenizer(world)


@pytest.mark.parametrize(
    "text",
    ["Héllo wörld", "  two  spaces \n\n\t and tabs\r\n", "日本語 🙂 {braces} </tag>", "Mara is", "x" * 300, "end "],
)
def test_any_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_world_word_is_one_token(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    assert [word for word in world.words() if len(tokenizer.encode(f" {word}")) != 1] == []


def test_windows_of_a_document_decode_and_encode_to_themselves(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer.encode(document_of(world, "train", 0).text)
    for start in range(0, 96):
        window = ids[start : start + 32]
        assert tokenizer.encode(tokenizer.decode(window)) == window


def test_a_document_has_as_many_tokens_as_words(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    document = document_of(world, "train", 0)
    ids = tokenizer.encode(document.text)
    assert ids == WordCodec(tokenizer).ids(document.words, starts_document=True)


def test_nothing_is_added_and_the_vocabulary_is_small(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode("") == []
    assert len(tokenizer) <= 1024
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]


@pytest.mark.parametrize("label", [" A", " B", " safe", " unsafe", " none", " possible", " definite"])
def test_every_label_is_one_token(tokenizer: PreTrainedTokenizerFast, label: str) -> None:
    assert len(tokenizer.encode(label)) == 1


@pytest.mark.parametrize("name", ["rewriter", "quality", "safety", "factuality"])
def test_a_filled_prompt_has_the_tokens_of_the_filled_file(
    world: World, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    codec = WordCodec(tokenizer)
    words = document_of(world, "train", 0).words
    texts = {"prefix": codec.decode(codec.ids(words[:40], starts_document=True)), "bridge": ""}
    for place, field in enumerate(("suffix", "a", "b", "candidate", "reference")):
        texts[field] = codec.decode(codec.ids(words[30 + place : 62 + place]))
    filled = PromptLayout(name, codec).fill({field: codec.encode(text) for field, text in texts.items()})
    assert tokenizer.decode(filled.ids) == prompt_text(name).format(**texts)
    assert filled.ids == tokenizer.encode(prompt_text(name).format(**texts))


def test_prompts_end_right_before_the_label() -> None:
    for name in ("rewriter", "quality", "safety", "factuality"):
        assert prompt_text(name).endswith(":")


@pytest.mark.parametrize(
    ("name", "placeholders"),
    [
        ("rewriter", {"prefix", "suffix"}),
        ("quality", {"prefix", "a", "b"}),
        ("safety", {"candidate"}),
        ("factuality", {"prefix", "reference", "candidate"}),
    ],
)
def test_the_services_read_the_prompt_files_as_the_recipe_does(name: str, placeholders: set[str]) -> None:
    prompt = Prompt.load(PROMPT_FOLDER / f"{name}.txt", required=placeholders)
    assert prompt.text == prompt_text(name)
    assert prompt.placeholders == placeholders
