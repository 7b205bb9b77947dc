"""From one scored window to its preference pairs. Pure; called by the inbox for every window it reads.

| objective | chosen | rejected |
|---|---|---|
| `dpo` | highest reward of the whole pool | lowest reward of the whole pool |
| `rf_nll` | highest reward of the whole pool | - |
| `sft_rewrite`, `sft_rollout`, `next_token` | the rewrite, one rollout drawn at random, the original | - |
| `dpo_rewrite_over_rollout` | the rewrite | one rollout that differs from it, drawn at random |

Equal candidates are one with several kinds (shared/records.py), and it is of each of them. Two kinds of draw:
- Ties among the highest (or lowest) are broken evenly over the candidates, however often one was made: a copy says
  nothing about its worth. By order, the share of chosen rollouts would say how the collector lists candidates.
- A rollout is drawn evenly over the samples made: one that was sampled twice has twice the chance, as the policy gives
  it twice as often.
Draws are seeded by run seed, window and chunk, so that a window read again after a crash gives the same pairs in
the same order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from shared.records import NO_PREFERENCE, Candidate, CandidateKind, ScoredChunk, ScoredWindow, TokenIds
from shared.settings import Objective

NoPair = Literal["no_preference", "missing"]
_Choice = tuple[Candidate, Candidate | None]


@dataclass(frozen=True)
class Preference:
    """One chosen suffix, and for DPO a rejected one, after the same raw prefix."""

    window_id: str
    trunk: TokenIds
    """The whole window; the prefix is `trunk[:start]`."""
    start: int
    chosen: Candidate
    rejected: Candidate | None
    """None for the NLL objectives."""
    weight_version: int | None
    """Oldest weight version among the window's rollouts; None if it has none."""

    @property
    def suffixes(self) -> tuple[TokenIds, ...]:
        """Chosen, then rejected."""
        return (self.chosen.token_ids,) if self.rejected is None else (self.chosen.token_ids, self.rejected.token_ids)


@dataclass(frozen=True)
class Selection:
    """What one window gives."""

    pairs: tuple[Preference, ...]
    """In the order of the chunks."""
    no_preference: int
    """Chunks whose rewards lie too close together, whose candidates are all equal, or whose rollouts all equal the
    rewrite."""
    missing: int
    """Chunks without the candidates, or without the judgement, that the objective needs."""


def select_pairs(window: ScoredWindow, objective: Objective, *, min_reward_gap: float, seed: int) -> Selection:
    """The window's pairs: the same for the same window, objective and seed."""
    pairs: list[Preference] = []
    without: list[NoPair] = []
    oldest_version = window.oldest_weight_version
    for chunk in window.chunks:
        random = Random(f"{seed}:{window.window_id}:{chunk.start}")
        choice = _SELECTORS[objective](chunk, random, min_reward_gap)
        if isinstance(choice, str):
            without.append(choice)
            continue
        chosen, rejected = choice
        pairs.append(Preference(window.window_id, window.token_ids, chunk.start, chosen, rejected, oldest_version))
    all_equal = sum(lost.reason == NO_PREFERENCE for lost in window.dropped_chunks)
    return Selection(tuple(pairs), all_equal + without.count("no_preference"), without.count("missing"))


def rewards_by_kind(window: ScoredWindow) -> dict[CandidateKind, tuple[float, int]]:
    """Per kind the sum of rewards and the number of judged candidates, each as often as it was made."""
    sums: dict[CandidateKind, tuple[float, int]] = {}
    for chunk in window.chunks:
        for candidate, reward in _judged(chunk):
            for kind in candidate.kinds:
                total, count = sums.get(kind, (0.0, 0))
                sums[kind] = (total + reward, count + 1)
    return sums


def _highest_over_lowest(chunk: ScoredChunk, random: Random, min_reward_gap: float) -> _Choice | NoPair:
    pool = _judged(chunk)
    if len(pool) < 2:
        return "missing"
    highest, lowest = max(reward for _, reward in pool), min(reward for _, reward in pool)
    if highest - lowest <= min_reward_gap:
        return "no_preference"
    return _draw(pool, highest, random), _draw(pool, lowest, random)


def _highest(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Choice | NoPair:
    """A gap says nothing here: where all tie, each candidate is as good as the filter can tell. One alone is the best
    of its pool without a judge (services/collector/collect.py)."""
    if len(chunk.candidates) == 1 and chunk.candidates[0].token_ids:
        return chunk.candidates[0], None
    pool = _judged(chunk)
    if not pool:
        return "missing"
    return _draw(pool, max(reward for _, reward in pool), random), None


def _rewrite_over_rollout(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Choice | NoPair:
    """Samples that equal the rewrite are passed over: against itself it has no gradient."""
    rewrites, samples = _made(chunk, "rewrite"), _made(chunk, "rollout")
    if not rewrites or not samples:
        return "missing"
    others = [rollout for rollout in samples if "rewrite" not in rollout.kinds]
    return (rewrites[0], random.choice(others)) if others else "no_preference"


def _one_of(kind: CandidateKind) -> "_Selector":
    def select(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Choice | NoPair:
        found = _made(chunk, kind)
        return (random.choice(found), None) if found else "missing"

    return select


def _draw(pool: Sequence[tuple[Candidate, float]], reward: float, random: Random) -> Candidate:
    return random.choice([candidate for candidate, its_reward in pool if its_reward == reward])


def _made(chunk: ScoredChunk, kind: CandidateKind) -> list[Candidate]:
    """Candidates of this kind, each as often as it was made."""
    usable = (candidate for candidate in chunk.candidates if candidate.token_ids)
    return [candidate for candidate in usable for _ in range(candidate.kinds.count(kind))]


def _judged(chunk: ScoredChunk) -> list[tuple[Candidate, float]]:
    """Candidates with their rewards; none at all if a reward is not a number (never taken for a score)."""
    if chunk.judgement is None or not all(math.isfinite(reward) for reward in chunk.judgement.rewards):
        return []
    rewarded = zip(chunk.candidates, chunk.judgement.rewards, strict=True)
    return [(candidate, reward) for candidate, reward in rewarded if candidate.token_ids]


_Selector = Callable[[ScoredChunk, Random, float], _Choice | NoPair]
_SELECTORS: dict[Objective, _Selector] = {
    "dpo": _highest_over_lowest,
    "rf_nll": _highest,
    "sft_rewrite": _one_of("rewrite"),
    "sft_rollout": _one_of("rollout"),
    "next_token": _one_of("original"),
    "dpo_rewrite_over_rollout": _rewrite_over_rollout,
}
