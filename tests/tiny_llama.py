"""Random Llama models small enough for tests."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocab_size: int, *, seed: int = 0, **shape: Any) -> LlamaForCausalLM:
    """2 layers, width 32 and context 256, in evaluation mode; `shape`: other keys of LlamaConfig."""
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(vocab_size=vocab_size, **defaults | shape)
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    return model
