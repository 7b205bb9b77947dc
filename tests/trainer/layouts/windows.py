"""Windows for the tests of the layouts."""

import torch

from shared.records import ScoredChunk, TokenIds
from tests.trainer.windows import candidate, plain_window
from trainer.layouts.base import Layout, Pass, WindowPairs
from trainer.preferences import Preference, select_pairs

CPU = torch.device("cpu")


def some_pairs(position: int = 3, *, num_chunks: int = 5, objective: str = "dpo") -> WindowPairs:
    """Prefixes of 4 to 20 tokens, suffixes of 1 to 4: original, rollout, and as the rewrite the original backwards."""
    plain = plain_window(position, num_chunks=num_chunks)
    window = plain.model_copy(update={"chunks": tuple(map(_with_rewrite, plain.chunks))})
    return select_pairs(window, objective, min_reward_gap=0.0, seed=0).pairs


def _with_rewrite(chunk: ScoredChunk) -> ScoredChunk:
    """Whose reward lies between the two others'."""
    original, rollout = chunk.candidates
    assert chunk.judgement is not None
    return chunk.model_copy(
        update={
            "candidates": (original, candidate("rewrite", *original.token_ids[::-1]), rollout),
            "judgement": chunk.judgement.model_copy(update={"rewards": (1.0, 0.5, 0.0)}),
        }
    )


def the_only_pass(layout: Layout, *windows: WindowPairs) -> Pass:
    ((plan,),) = layout.plan(windows, max_tokens=100_000)
    return layout.lay_out(plan, device=CPU)


def pair(
    trunk: TokenIds, start: int, chosen: TokenIds, rejected: TokenIds | None = None, *, window: str = "w"
) -> Preference:
    sides = [None if side is None else candidate("rollout", *side) for side in (chosen, rejected)]
    assert sides[0] is not None
    return Preference(window, trunk, start, sides[0], sides[1])
