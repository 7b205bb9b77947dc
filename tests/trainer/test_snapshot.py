"""A snapshot has the names and values that `save_pretrained` writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.trainer.conftest import tiny_llama
from trainer.snapshot import Snapshot

SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **SPECIAL, tie_word_embeddings=True))


def qwen3_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **SPECIAL, **experts))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **SPECIAL, num_local_experts=4, num_experts_per_tok=2))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, tied": lambda: tiny_llama(tie=True),
    "llama, untied": lambda: tiny_llama(tie=False),
    "qwen2": qwen2,
    "gpt2": gpt2,
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
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
