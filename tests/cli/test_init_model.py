"""A from-scratch policy that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.init_model import init_model
from shared.errors import SettingsError

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "context": 64
}  # fmt: skip


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    lines = ["no json", *(json.dumps({"body": f"the {n} green hills and the sea"}) for n in range(50))]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _make(documents: Path, out: Path, *, seed: int = 0) -> int:
    return init_model(documents=str(documents), out=out, text_field="body", seed=seed, **SHAPE)


def test_the_model_loads_and_any_text_survives_its_tokenizer(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert _make(documents, tmp_path / "model") == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    text = "Ünïcode 犬 🦊\n\tthe sea"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 0, 0)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_weights(documents: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _make(documents, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_model_is_never_overwritten(documents: Path, tmp_path: Path) -> None:
    _make(documents, tmp_path / "model")
    with pytest.raises(SettingsError, match="already contains a model"):
        _make(documents, tmp_path / "model")


def test_documents_without_the_field_are_an_error(documents: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no text to train a tokenizer on \\(field 'text'\\)"):
        init_model(documents=str(documents), out=tmp_path / "model", **SHAPE)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"vocab_size": 256}, "--vocab-size must be at least 257"),
        ({"hidden_size": 30, "num_heads": 4}, "must be a multiple of"),
        ({"num_heads": 4, "num_kv_heads": 3}, "must be a multiple of --num-kv-heads"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_an_impossible_shape_is_refused(shape: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        init_model(documents="unread", out=tmp_path / "model", **shape)
