"""Reference answers: plain forward passes of transformers, one sequence at a time, no cache."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@lru_cache(maxsize=4)
def _module(model: Path) -> Any:
    module: Any = AutoModelForCausalLM.from_pretrained(model)
    return module.eval().requires_grad_(False)


def greedy(model: Path, prompt: Sequence[int], num_tokens: int, *, eos: int = 0) -> tuple[int, ...]:
    """The likeliest continuation, up to and including the end of sequence."""
    found: list[int] = []
    while len(found) < num_tokens and eos not in found:
        found.append(int(_module(model)(torch.tensor([[*prompt, *found]])).logits[0, -1].argmax()))
    return tuple(found)


def log_probs(model: Path, prompt: Sequence[int], continuation: Sequence[int]) -> list[float]:
    """Per token of the continuation."""
    logits = _module(model)(torch.tensor([[*prompt, *continuation]])).logits[0]
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return [float(row[token]) for row, token in zip(rows, continuation, strict=True)]
