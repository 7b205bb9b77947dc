"""The seam between a step's windows and the model: plans, passes, and what a layout must do.

    windows -> Layout.plan -> PassPlans by rank -> Layout.lay_out -> Pass -> SuffixLogProbs (trainer/log_probs.py)

A window is here the tuple of its pairs, in the order of its chunks; they share one trunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.preferences import Preference

WindowPairs = tuple[Preference, ...]


@dataclass(frozen=True)
class PassPlan:
    """What one forward computes. Plain data: rank 0 makes the plans and sends them to the other ranks."""

    windows: tuple[WindowPairs, ...]
    """All pairs of a window, or some of them where the window exceeds the token budget. Never half a pair."""
    counted: bool = True
    """False: a copy that only keeps this rank's number of forwards equal to the others'. Its loss counts as zero."""

    @property
    def pairs(self) -> list[Preference]:
        return [pair for window in self.windows for pair in window]


@dataclass(frozen=True)
class Pass:
    """One forward: B rows of S tokens, the M suffixes whose log-probs it gives, and their N tokens.

    Suffixes 0..P-1 are the chosen ones of the plan's P pairs; for DPO P..2P-1 are their rejected ones, in that order.
    """

    input_ids: Tensor
    """(B, S) long."""
    position_ids: Tensor | None
    """(B, S) long: the place of each token in its own sequence, from 0. None: 0..S-1 in every row."""
    rows: Tensor
    """(N,) flat index into B * S of the token that predicts each suffix token: the one before it."""
    targets: Tensor
    """(N,) the suffix token itself."""
    suffixes: Tensor
    """(N,) which of the M suffixes it belongs to, ascending."""
    num_targets: Tensor
    """(M,) length of each suffix."""
    num_separate_tokens: int
    """Tokens that separate sequences would need, without padding."""
    attention: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the model's forward: what the layout's attention kernel needs."""

    @property
    def num_tokens(self) -> int:
        """Through the model, padding included."""
        return self.input_ids.numel()


class Layout(Protocol):
    @property
    def attention_implementation(self) -> str:
        """What the model is switched to (`set_attn_implementation`); it is loaded with "sdpa"."""

    def plan(self, windows: Sequence[WindowPairs], *, max_tokens: int, num_ranks: int = 1) -> list[list[PassPlan]]:
        """By rank the passes of a step: balanced by tokens, equally many for every rank, each of at most `max_tokens`
        but at least one pair."""

    def lay_out(self, plan: PassPlan, *, device: torch.device) -> Pass: ...
