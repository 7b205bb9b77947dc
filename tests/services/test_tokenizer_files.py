"""A tokenizer read without transformers is the one that AutoTokenizer gives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto as auto

from services.tokenizer import load_tokenizer, same_tokens
from services.tokenizer_files import _CLASS_BY_MODEL, NeedsTransformersError, read_files
from tests.services.subject_tokenizers import FOLDERS, TEXTS, TRANSFORMERS_ONLY, byte_level, save_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces  and a tab\t",
    "\r\nlines\r\n\n\rof all kinds\n",
    "<s>a</s><unk><|pad|> <tool> <|user|> <|endoftext|> <0xE7> moon !",
    "e\u0301 \u00e9 \u212b \ufb01 A\u030a\u0323",
    "👩‍👩‍👧‍👦🏳️‍🌈 👍🏽",
    b"caf\xe9 \xff\x00 \xf0\x9f".decode(errors="replace"),
    "▁ĠĊ ▁▁ Ġ",
    "3.14159 100,000 2026-11-24",
    "犬も歩けば don't WE'LL \u00a0\u3000\u200b",
]


def check(folder: Path) -> None:
    """That both loaders give the same."""
    ours, theirs = load_tokenizer(str(folder), setting="policy.model"), AutoTokenizer.from_pretrained(folder)
    assert ours.vocabulary() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert ours.end == theirs.eos_token_id
    assert ours.beginning == (theirs.bos_token_id if theirs.encode("a")[0] == theirs.bos_token_id else None)
    special = {token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special}
    named = {theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id} - {None}
    assert ours.control_ids == (special | set(theirs.all_special_ids)) - {theirs.unk_token_id} | named
    check_text(ours, theirs)


def check_text(ours: Any, theirs: Any) -> None:
    @settings(max_examples=150, deadline=None, database=None)
    @given(st.text() | st.lists(st.sampled_from([*ODD_TEXTS, *TEXTS.values()]), max_size=3).map("".join))
    def ids_agree(text: str) -> None:
        for splits in (True, False):
            expected = theirs(text, add_special_tokens=False, split_special_tokens=splits, verbose=False)["input_ids"]
            assert ours.encode(text, splits_special=splits) == expected

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(st.integers(0, len(theirs) - 1)))
    def texts_agree(ids: list[int]) -> None:
        for skips in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skips_special=skips) == expected

    ids_agree()
    texts_agree()
    for text in (*ODD_TEXTS, *TEXTS.values()):
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    FOLDERS[name](tmp_path)
    read_files(str(tmp_path))
    check(tmp_path)


@pytest.mark.parametrize("name", TRANSFORMERS_ONLY)
def test_what_transformers_reads_otherwise_is_left_to_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    TRANSFORMERS_ONLY[name](tmp_path)
    with pytest.raises(NeedsTransformersError):
        read_files(str(tmp_path))
    with caplog.at_level("INFO", "services.tokenizer"):
        check(tmp_path)
    assert "300 MB" in caplog.text


def test_the_loader_does_not_matter_for_equality(tmp_path: Path) -> None:
    for name in ("byte-level", "older files", "GPT-2 with default tokens"):
        (FOLDERS | TRANSFORMERS_ONLY)[name](tmp_path / name)
    light, other, heavy = (load_tokenizer(str(folder), setting="policy.model") for folder in sorted(tmp_path.iterdir()))
    assert same_tokens(light, light)
    assert not same_tokens(light, other)
    assert not same_tokens(light, heavy)


def test_model_types_that_replace_the_class_are_those_of_transformers() -> None:
    names = auto.TOKENIZER_MAPPING_NAMES
    replaced = {name: names[name] for name in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS}
    assert {name: kind for name, kind in replaced.items() if kind != "TokenizersBackend"} == _CLASS_BY_MODEL


def test_a_hugging_face_name_is_read_from_the_cache(tmp_path: Path) -> None:
    """In another process, because huggingface_hub reads its environment when it is imported."""
    repository = tmp_path / "hub" / "models--someone--policy"
    save_tokenizer(byte_level(adds_bos=True), repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    program = """
import sys
from services.tokenizer import load_tokenizer
assert load_tokenizer("someone/policy", setting="policy.model").beginning == 1
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
