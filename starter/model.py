"""The tiny Llamas: their configurations, and how they are saved and loaded as Hugging Face folders."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

MAX_POSITIONS = 512
NUM_POLICY_LAYERS = 3
NUM_TEACHER_LAYERS = 4


def build_llama(tokenizer: PreTrainedTokenizerFast, *, num_layers: int, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model of width 128 with tied embeddings."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes weights in half precision beside the tokenizer; the model in memory keeps its precision."""
    half = LlamaForCausalLM(model.config)  # type: ignore[no-untyped-call]
    nn.Module.half(half)
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_model(folder: Path, *, device: str = "cpu") -> LlamaForCausalLM:
    """The model of a folder in single precision, ready to evaluate."""
    _require(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return ready(model, device)


def ready(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    """The same model, moved and set to evaluate."""
    nn.Module.to(model, torch.device(device))
    nn.Module.eval(model)
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    _require(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def _require(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}; make it with: python -m starter.make --out {folder.parent}")
