"""A snapshot has the names and values that `save_pretrained` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.trainer.conftest import tiny_llama
from trainer.snapshot import Snapshot

SHAPE: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
SHAPE |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def built(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = cast(Any, AutoModelForCausalLM).from_config(config)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied": lambda: tiny_llama(tie=True),
    "llama, untied": lambda: tiny_llama(tie=False),
    "qwen2": lambda: built(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "gpt2": lambda: built(GPT2Config(**SHAPE)),
    "qwen3-moe": lambda: built(Qwen3MoeConfig(**SHAPE, **EXPERTS)),
    "mixtral": lambda: built(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}


def taken(model: PreTrainedModel, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    snapshot = Snapshot()
    snapshot.take(model, dtype=dtype)
    found = dict(snapshot.tensors())
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == snapshot.layouts
    assert list(found) == list(snapshot.layouts)
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loaded", [False, True])
def test_names_and_values_are_those_of_save_pretrained(kind: str, loaded: bool, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "first")
    if loaded:  # transformers then remembers how it converted
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert_same(taken(model), load_file(tmp_path / "second" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["llama, tied", "qwen3-moe"])
def test_floating_tensors_are_rounded(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    expected = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert_same(taken(model, torch.bfloat16), expected)


def test_a_snapshot_keeps_the_weights_of_its_moment_until_the_next() -> None:
    model, snapshot = tiny_llama(), Snapshot()
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        snapshot.take(model)
        model.model.norm.weight.fill_(2.0)
    assert float(dict(snapshot.tensors())["model.norm.weight"][0]) == 1.0
    snapshot.take(model)
    assert float(dict(snapshot.tensors())["model.norm.weight"][0]) == 2.0
