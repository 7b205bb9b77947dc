"""From one scored document to its preference pairs. Pure; called by the inbox for every document it reads.

| objective | chosen | rejected |
|---|---|---|
| `dpo` | highest reward of the whole pool | lowest reward of the whole pool |
| `rf_nll` | highest reward of the whole pool | - |
| `sft_rewrite`, `sft_rollout`, `next_token` | the rewrite, the first rollout, the original | - |
| `dpo_rewrite_over_rollout` | the rewrite | one rollout, drawn at random |

Ties among the highest (or lowest) are broken at random: by order, the share of chosen rollouts would be an artefact
of the order in which the collector lists candidates. The draw is seeded by run seed, document and chunk, so that a
document read again after a crash gives the same pairs in the same order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from shared.records import Candidate, CandidateKind, ScoredChunk, ScoredDocument, TokenIds
from shared.settings import Objective

NoPair = Literal["no_preference", "missing"]
_Choice = tuple[Candidate, Candidate | None]


@dataclass(frozen=True)
class Preference:
    """One chosen suffix, and for DPO a rejected one, after the same raw prefix."""

    document_id: str
    trunk: TokenIds
    """The whole window; the prefix is `trunk[:start]`."""
    start: int
    chosen: Candidate
    rejected: Candidate | None
    """None for the NLL objectives."""
    policy_version: int | None
    """Oldest weight version among the document's rollouts; None if it has none."""

    @property
    def suffixes(self) -> tuple[TokenIds, ...]:
        """Chosen, then rejected."""
        return (self.chosen.token_ids,) if self.rejected is None else (self.chosen.token_ids, self.rejected.token_ids)


@dataclass(frozen=True)
class Selection:
    """What one document gives."""

    pairs: tuple[Preference, ...]
    """In the order of the chunks."""
    no_preference: int
    """Chunks whose rewards lie too close together, or whose chosen and rejected are the same tokens."""
    missing: int
    """Chunks without the candidates, or without the judgement, that the objective needs."""


def select_pairs(document: ScoredDocument, objective: Objective, *, min_reward_gap: float, seed: int) -> Selection:
    """The document's pairs: the same for the same document, objective and seed."""
    pairs: list[Preference] = []
    without: list[NoPair] = []
    oldest_version = document.oldest_policy_version
    for chunk in document.chunks:
        random = Random(f"{seed}:{document.document_id}:{chunk.start}")
        choice = _SELECTORS[objective](chunk, random, min_reward_gap)
        if isinstance(choice, str):
            without.append(choice)
            continue
        chosen, rejected = choice
        pairs.append(
            Preference(document.document_id, document.token_ids, chunk.start, chosen, rejected, oldest_version)
        )
    return Selection(tuple(pairs), without.count("no_preference"), without.count("missing"))


def rewards_by_kind(document: ScoredDocument) -> dict[CandidateKind, tuple[float, int]]:
    """Per kind the sum of rewards and the number of judged candidates."""
    sums: dict[CandidateKind, tuple[float, int]] = {}
    for chunk in document.chunks:
        for candidate, reward in _judged(chunk):
            total, count = sums.get(candidate.kind, (0.0, 0))
            sums[candidate.kind] = (total + reward, count + 1)
    return sums


def _highest_over_lowest(chunk: ScoredChunk, random: Random, min_reward_gap: float) -> _Choice | NoPair:
    pool = _judged(chunk)
    if len(pool) < 2:
        return "missing"
    highest, lowest = max(reward for _, reward in pool), min(reward for _, reward in pool)
    if highest - lowest <= min_reward_gap:
        return "no_preference"
    chosen, rejected = _draw(pool, highest, random), _draw(pool, lowest, random)
    return "no_preference" if chosen.token_ids == rejected.token_ids else (chosen, rejected)


def _highest(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Choice | NoPair:
    """A gap says nothing here: where all tie, each candidate is as good as the filter can tell."""
    pool = _judged(chunk)
    if not pool:
        return "missing"
    return _draw(pool, max(reward for _, reward in pool), random), None


def _rewrite_over_rollout(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Choice | NoPair:
    rewrites, rollouts = _of_kind(chunk, "rewrite"), _of_kind(chunk, "rollout")
    if not rewrites or not rollouts:
        return "missing"
    rejected = random.choice(rollouts)
    return "no_preference" if rewrites[0].token_ids == rejected.token_ids else (rewrites[0], rejected)


def _first_of(kind: CandidateKind) -> "_Selector":
    def select(chunk: ScoredChunk, _random: Random, _min_reward_gap: float) -> _Choice | NoPair:
        found = _of_kind(chunk, kind)
        return (found[0], None) if found else "missing"

    return select


def _draw(pool: Sequence[tuple[Candidate, float]], reward: float, random: Random) -> Candidate:
    return random.choice([candidate for candidate, its_reward in pool if its_reward == reward])


def _of_kind(chunk: ScoredChunk, kind: CandidateKind) -> list[Candidate]:
    return [candidate for candidate in chunk.candidates if candidate.kind == kind and candidate.token_ids]


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
    "sft_rewrite": _first_of("rewrite"),
    "sft_rollout": _first_of("rollout"),
    "next_token": _first_of("original"),
    "dpo_rewrite_over_rollout": _rewrite_over_rollout,
}
