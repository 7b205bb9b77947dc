"""Windows for the tests of the layouts."""

import torch

from shared.records import TokenIds
from tests.trainer.windows import candidate, plain_window
from trainer.layouts.base import Layout, Pass, WindowPairs
from trainer.preferences import Preference, select_pairs

CPU = torch.device("cpu")


def some_pairs(position: int = 3, *, num_chunks: int = 5, objective: str = "dpo") -> WindowPairs:
    """Prefixes of 4 to 20 tokens, suffixes of 1 to 4: the original, and for DPO a rollout."""
    window = plain_window(position, num_chunks=num_chunks)
    return select_pairs(window, objective, min_reward_gap=0.0, seed=0).pairs


def the_only_pass(layout: Layout, *windows: WindowPairs) -> Pass:
    ((plan,),) = layout.plan(windows, max_tokens=100_000)
    return layout.lay_out(plan, device=CPU)


def pair(
    trunk: TokenIds, start: int, chosen: TokenIds, rejected: TokenIds | None = None, *, window: str = "w"
) -> Preference:
    sides = [None if side is None else candidate("rollout", *side) for side in (chosen, rejected)]
    assert sides[0] is not None
    return Preference(window, trunk, start, sides[0], sides[1])
