"""The reference layout: each suffix after its own copy of the prefix, right-padded, sorted by length.

There is no attention mask and there are no position ids: attention is causal and padding is on the right, so no real
token sees it, and the kernels keep their causal fast path.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from trainer.layouts.base import Pass, PassPlan, WindowPairs
from trainer.layouts.packing import Unit, plan_passes
from trainer.preferences import Preference


class SeparateLayout:
    attention_implementation = "sdpa"

    def plan(self, windows: Sequence[WindowPairs], *, max_tokens: int, num_ranks: int = 1) -> list[list[PassPlan]]:
        """Of single pairs: each is a window of its own."""
        units = [Unit((pair,), _length(pair)) for window in windows for pair in window]
        return plan_passes(units, _cost, max_tokens=max_tokens, num_ranks=num_ranks)

    def lay_out(self, plan: PassPlan, *, device: torch.device) -> Pass:
        """All chosen sequences, then all rejected ones."""
        pairs = plan.pairs
        sides = range(len(pairs[0].suffixes))
        sequences = [(pair.trunk[: pair.start], pair.suffixes[side]) for side in sides for pair in pairs]
        num_targets = torch.tensor([len(suffix) for _, suffix in sequences])
        starts = torch.tensor([len(prefix) for prefix, _ in sequences])
        suffixes = torch.repeat_interleave(torch.arange(len(sequences)), num_targets)
        columns = torch.cat([torch.arange(len(suffix)) for _, suffix in sequences])
        input_ids = pad_sequence([torch.tensor([*prefix, *suffix]) for prefix, suffix in sequences], batch_first=True)
        return Pass(
            input_ids=input_ids.to(device),
            position_ids=None,
            rows=(suffixes * input_ids.shape[1] + starts[suffixes] + columns - 1).to(device),
            targets=input_ids[suffixes, starts[suffixes] + columns].to(device),
            suffixes=suffixes.to(device),
            num_targets=num_targets.to(device),
            num_separate_tokens=int((starts + num_targets).sum()),
        )


def _length(pair: Preference) -> int:
    return pair.start + max(len(suffix) for suffix in pair.suffixes)


def _cost(units: Sequence[Unit]) -> int:
    """Padding included."""
    return max(unit.size for unit in units) * sum(len(pair.suffixes) for unit in units for pair in unit.pairs)
