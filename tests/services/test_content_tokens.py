"""Content of all kinds of tokenizers: no added token, whatever a text spells, and what it says."""

from pathlib import Path
from unicodedata import normalize

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.content_tokens import content_encoder
from services.tokenizer import TokenCodec, from_transformers, load_tokenizer
from tests.services.subject_tokenizers import FOLDERS, SPECIALS, TEXTS, TRANSFORMERS_ONLY, byte_level, save_tokenizer

SPELLED = [
    "</s>",
    "a</s> b",
    " <s>[INST]",
    "<tool>",
    "x <tool> moon ",
    "<|user|>",
    "<|pad|>",
    "<0x0A>",
    "<0x41>a",
    "<image>",
]
PLAIN = ["", " ", " The moon", "The moon", "\n\nThe", "  a  b", *TEXTS.values()]
NO_LETTERS = {"word level", "T5"}
"""Unknown words and spaces have no tokens there."""


@pytest.mark.parametrize("name", [*FOLDERS, *TRANSFORMERS_ONLY])
def test_contents_give_no_added_token_and_say_the_text(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    {**FOLDERS, **TRANSFORMERS_ONLY}[name](tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    codec = TokenCodec(load_tokenizer(str(tmp_path), setting="policy.model"))
    again = TokenCodec(from_transformers(AutoTokenizer.from_pretrained(tmp_path)))
    added = set(found.added_tokens_decoder) - ({found.unk_token_id} - codec.tokenizer.control_ids)
    for text in (*SPELLED, *PLAIN):
        ids = codec.encode_content(text)
        assert not added & set(ids), text
        assert ids == again.encode_content(text)
        said = codec.continuation(codec.anchor, ids).text
        assert name in NO_LETTERS or said in (text, normalize("NFC", text)), "Qwen's tokenizer composes accents"


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "older files"])  # it has " moon " as added token
def test_harmless_contents_have_the_tokens_that_the_model_knows(name: str, tmp_path: Path) -> None:
    FOLDERS[name](tmp_path)
    codec = TokenCodec(load_tokenizer(str(tmp_path), setting="policy.model"))
    for text in ["", " The", "The", "\n\nThe", *TEXTS.values()]:
        assert codec.encode_content(text) == codec.encode_continuation(text)


def test_words_of_a_vocabulary_that_are_control_tokens_are_not_reached() -> None:
    """Cut at spaces, the vocabulary has `</s>` as a word."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "moon": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<unk>", "</s>"])
    assert core.encode("moon </s>").ids == [2, 1]
    assert content_encoder(core, frozenset({1}))("moon </s>") == [2, 0]


def test_pieces_of_a_unigram_model_that_are_control_tokens_are_not_reached() -> None:
    letters = [(letter, -5.0) for letter in "</s>mon"]
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    core.decoder = decoders.Fuse()
    assert core.encode("</s>").ids == [1], "without any added token"
    assert core.decode(content_encoder(core, frozenset({0, 1}))("</s>moon")) == "</s>moon"


def test_merges_that_lead_to_an_added_token_are_left_out() -> None:
    core = byte_level(adds_bos=False)
    moon = core.encode(" moon").ids
    assert len(moon) == 1
    core.add_tokens(["Ġmoon"])
    ids = content_encoder(core, frozenset({moon[0]}))(" moon")
    assert moon[0] not in ids
    assert core.decode(ids) == " moon"


def test_runs_of_spaces_stay_tokens(tmp_path: Path) -> None:
    """GPT-NeoX has added tokens for indentation."""
    core = byte_level(adds_bos=False)
    core.add_tokens([" " * 8])
    save_tokenizer(core, tmp_path)
    codec = TokenCodec(load_tokenizer(str(tmp_path), setting="policy.model"))
    text = "x" + " " * 8 + "</s>"
    assert codec.decode(codec.encode_content(text)) == text
    assert not {SPECIALS.index("</s>")} & set(codec.encode_content(text))
