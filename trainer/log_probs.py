"""From a pass to the log-probs of its suffixes: the model's body, then the head on the rows that predict suffix tokens.

A module of its own, so that a sharded policy (FSDP2) gathers its parameters when it is called.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from shared.errors import TrainingError
from trainer.layouts.base import Pass

_MAX_LOGITS = 2**25
"""Kept for the backward pass: 128 MB. Beyond, logits are made a chunk at a time, and again in the backward pass."""
_MIN_ROWS = 1024
"""Of a chunk, so that adding to the head's gradient costs less than making it."""


class SuffixLogProbs(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, one: Pass) -> Tensor:
        """(M,) fp32: the log-probability of each suffix given its prefix, summed over its tokens."""
        body = cast(nn.Module, self.model.base_model)
        positions = {} if one.position_ids is None else {"position_ids": one.position_ids}
        answer = body(input_ids=one.input_ids, use_cache=False, **positions, **one.attention)
        hidden = answer.last_hidden_state.flatten(0, 1)[one.rows]  # (N, H)
        token_log_probs = _token_log_probs(output_head(self.model), hidden, one.targets)  # (N,)
        return torch.zeros_like(one.num_targets, dtype=torch.float32).index_add(0, one.suffixes, token_log_probs)


def output_head(model: PreTrainedModel) -> nn.Linear:
    """Hidden states -> logits. Raises TrainingError if the model has none, or one that is more than a matrix."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Linear):
        raise TrainingError(f"{type(model).__name__} has no linear output head: give a causal language model")
    return head


def _token_log_probs(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (N, H), targets (N,) -> (N,) fp32."""
    if len(hidden) * head.out_features <= _MAX_LOGITS:
        return -functional.cross_entropy(head(hidden).float(), targets, reduction="none")
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        chunked = _ChunkedLogProbs.apply(hidden.to(dtype), head.weight.to(dtype), bias, targets)  # type: ignore[no-untyped-call]
    return cast(Tensor, chunked)


class _ChunkedLogProbs(torch.autograd.Function):
    """log p = logit of the target - lse; its gradient by the logits is one-hot - exp(logits - lse), chunk by chunk.

    Written by hand because autograd would keep the logits, and add up one head gradient (V, H) a chunk.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        log_probs = torch.empty_like(targets, dtype=torch.float32)
        lse = torch.empty_like(log_probs)
        for rows in _chunks(hidden, weight):
            logits = functional.linear(hidden[rows], weight, bias).float()  # (C, V)
            lse[rows] = logits.logsumexp(-1)
            log_probs[rows] = logits.gather(1, targets[rows, None])[:, 0] - lse[rows]
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            grad = grads[0][rows, None]
            wide = functional.linear(hidden[rows], weight, bias).float()
            wide.sub_(lse[rows, None]).exp_().mul_(-grad).scatter_add_(1, targets[rows, None], grad)  # (C, V)
            narrow = wide.to(hidden.dtype)
            torch.mm(narrow, weight, out=grad_hidden[rows])
            grad_weight += narrow.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += wide.sum(0)
        return grad_hidden, grad_weight.to(weight.dtype), None if grad_bias is None else grad_bias.to(bias.dtype), None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(_MAX_LOGITS // len(weight), _MIN_ROWS)
    return [slice(begin, begin + size) for begin in range(0, len(hidden), size)]
