"""From a pass to the log-probs of its suffixes: the model's body, then the head on the rows that predict suffix tokens.

A module of its own, so that a sharded policy (FSDP2) gathers its parameters when it is called.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from shared.errors import TrainingError
from trainer.layouts.base import Pass


class SuffixLogProbs(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, one: Pass) -> Tensor:
        """(M,) fp32: the log-probability of each suffix given its prefix, summed over its tokens."""
        body = cast(nn.Module, self.model.base_model)
        answer = body(input_ids=one.input_ids, position_ids=one.position_ids, use_cache=False, **one.attention)
        hidden = answer.last_hidden_state.flatten(0, 1)[one.rows]  # (N, H)
        logits = output_head(self.model)(hidden)  # (N, V)
        token_log_probs = -functional.cross_entropy(logits.float(), one.targets, reduction="none")  # (N,)
        return torch.zeros_like(one.num_targets, dtype=torch.float32).index_add(0, one.suffixes, token_log_probs)


def output_head(model: PreTrainedModel) -> nn.Module:
    """Hidden states -> logits. Raises TrainingError if the model has none."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise TrainingError(f"{type(model).__name__} has no output head: give a causal language model")
    return head
