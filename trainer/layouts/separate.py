"""The reference layout: each suffix after its own copy of the prefix, right-padded, sorted by length.

There is no attention mask: attention is causal and padding is on the right, so no real token sees it, and the kernels
keep their causal fast path.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from trainer.layouts.base import Pass, PassPlan, WindowPairs
from trainer.preferences import Preference


class SeparateLayout:
    attention_implementation = "sdpa"

    def plan(self, windows: Sequence[WindowPairs], *, max_tokens: int, num_ranks: int = 1) -> list[list[PassPlan]]:
        assert num_ranks == 1, "not yet"
        plans: list[PassPlan] = []
        batch: list[Preference] = []
        for pair in sorted((pair for window in windows for pair in window), key=_length):
            if batch and (len(batch) + 1) * len(pair.suffixes) * _length(pair) > max_tokens:
                plans.append(PassPlan((tuple(batch),)))
                batch = []
            batch.append(pair)
        return [[*plans, PassPlan((tuple(batch),))]] if batch else [plans]

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
        length = input_ids.shape[1]
        return Pass(
            input_ids=input_ids.to(device),
            position_ids=torch.arange(length, device=device).expand(input_ids.shape),
            rows=(suffixes * length + starts[suffixes] + columns - 1).to(device),
            targets=input_ids[suffixes, starts[suffixes] + columns].to(device),
            suffixes=suffixes.to(device),
            num_targets=num_targets.to(device),
            num_separate_tokens=int((starts + num_targets).sum()),
        )


def _length(pair: Preference) -> int:
    return pair.start + max(len(suffix) for suffix in pair.suffixes)
