"""From one scored window to its preference pairs. Pure; the reader calls it for every window that it reads.

    selection = select_pairs(window, "dpo", min_reward_gap=0.0, seed=0)
    selection.pairs[0].chosen, selection.pairs[0].rejected

Equal candidates are one candidate with several kinds (shared/records.py). One without a reward is neither chosen nor
rejected. A barred one is never chosen; it is rejected where its reward is the lowest. There are two kinds of draw:
- Ties among the highest (or lowest) are broken evenly over the candidates, however often each was made. Taking the
  first would make the share of chosen rollouts depend on the collector's order.
- A rollout is drawn evenly over the samples: one that was sampled twice is twice as likely, as under the policy.
Draws are seeded by run seed, window and chunk: a window that is redelivered gives the same pairs in the same order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from shared.objectives import OBJECTIVES
from shared.records import CANDIDATE_KINDS, NO_PREFERENCE, Candidate, CandidateKind, ScoredChunk, ScoredWindow, TokenIds

_NoPair = Literal["no_preference", "missing", "barred"]
_Pair = tuple[Candidate, Candidate | None]
_Choose = Callable[[ScoredChunk, Random, float], _Pair | _NoPair]


@dataclass(frozen=True)
class Preference:
    """A chosen suffix, for DPO also a rejected one, and the raw prefix of both."""

    window_id: str
    trunk: TokenIds
    """The whole window; the prefix is `trunk[:start]`."""
    start: int
    chosen: Candidate
    rejected: Candidate | None
    """None for the NLL objectives."""

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
    """Chunks whose rewards are too close, whose candidates are all equal, or whose rollouts all equal the rewrite."""
    missing: int
    """Chunks without the candidates or the judgement that the objective needs."""
    barred: int = 0
    """Chunks without a candidate that may be chosen: all that were judged are barred."""


def select_pairs(window: ScoredWindow, objective: str, *, min_reward_gap: float, seed: int) -> Selection:
    """At most one pair a chunk. The same window, objective and seed always give the same pairs."""
    choose = CHOICES[OBJECTIVES[objective].choice]
    pairs: list[Preference] = []
    without: list[_NoPair] = []
    for chunk in window.chunks:
        pair = choose(chunk, Random(f"{seed}:{window.window_id}:{chunk.start}"), min_reward_gap)
        if isinstance(pair, str):
            without.append(pair)
        else:
            pairs.append(Preference(window.window_id, window.token_ids, chunk.start, *pair))
    all_equal = sum(lost.reason == NO_PREFERENCE for lost in window.dropped_chunks)
    return Selection(
        tuple(pairs),
        no_preference=all_equal + without.count("no_preference"),
        missing=without.count("missing"),
        barred=without.count("barred"),
    )


def rewards_by_kind(window: ScoredWindow) -> dict[CandidateKind, tuple[float, int]]:
    """Per kind the sum of rewards and the number of judged candidates; copies count."""
    sums: dict[CandidateKind, tuple[float, int]] = {}
    for chunk in window.chunks:
        for candidate, reward in _judged(chunk):
            for kind in candidate.kinds:
                total, count = sums.get(kind, (0.0, 0))
                sums[kind] = (total + reward, count + 1)
    return sums


def _one_of(kind: CandidateKind) -> _Choose:
    def choose(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Pair | _NoPair:
        found = _made(chunk, kind)
        return (random.choice(found), None) if found else "missing"

    return choose


CHOICES: dict[str, _Choose] = {kind: _one_of(kind) for kind in CANDIDATE_KINDS}
"""By the name that a row of OBJECTIVES gives as its `choice`: a candidate kind, or one of the functions below."""


def _choice(choose: _Choose) -> _Choose:
    CHOICES[choose.__name__] = choose
    return choose


@_choice
def highest_over_lowest(chunk: ScoredChunk, random: Random, min_reward_gap: float) -> _Pair | _NoPair:
    pool = _judged(chunk)
    if len(pool) < 2:
        return "missing"
    allowed = _allowed(chunk, pool)
    if not allowed:
        return "barred"
    highest, lowest = max(reward for _, reward in allowed), min(reward for _, reward in pool)
    if highest - lowest <= min_reward_gap:
        return "no_preference"
    return _draw(allowed, highest, random), _draw(pool, lowest, random)


@_choice
def highest(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Pair | _NoPair:
    """Whatever the gap: where all tie, any is as good as the judge can tell. A lone candidate needs no judge, but one
    that was judged and is barred stays barred."""
    if len(chunk.candidates) == 1 and chunk.candidates[0].token_ids:
        return "barred" if chunk.judgement and chunk.judgement.barred else (chunk.candidates[0], None)
    pool = _judged(chunk)
    if not pool:
        return "missing"
    allowed = _allowed(chunk, pool)
    return (_draw(allowed, max(reward for _, reward in allowed), random), None) if allowed else "barred"


@_choice
def rewrite_over_rollout(chunk: ScoredChunk, random: Random, _min_reward_gap: float) -> _Pair | _NoPair:
    """Samples equal to the rewrite are skipped: a pair of equal suffixes has no gradient."""
    rewrites, samples = _made(chunk, "rewrite"), _made(chunk, "rollout")
    if not rewrites or not samples:
        return "missing"
    others = [rollout for rollout in samples if "rewrite" not in rollout.kinds]
    return (rewrites[0], random.choice(others)) if others else "no_preference"


def _allowed(chunk: ScoredChunk, pool: Sequence[tuple[Candidate, float]]) -> list[tuple[Candidate, float]]:
    """Those of the pool that may be chosen."""
    places = chunk.judgement.barred if chunk.judgement else ()
    barred = {chunk.candidates[place].token_ids for place in places}  # no two have the same
    return [(candidate, reward) for candidate, reward in pool if candidate.token_ids not in barred]


def _draw(pool: Sequence[tuple[Candidate, float]], reward: float, random: Random) -> Candidate:
    return random.choice([candidate for candidate, its_reward in pool if its_reward == reward])


def _made(chunk: ScoredChunk, kind: CandidateKind) -> list[Candidate]:
    """Candidates of this kind, each as often as it was made."""
    usable = (candidate for candidate in chunk.candidates if candidate.token_ids)
    return [candidate for candidate in usable for _ in range(candidate.kinds.count(kind))]


def _judged(chunk: ScoredChunk) -> list[tuple[Candidate, float]]:
    """Candidates with their rewards, without those that the judge could not score."""
    if chunk.judgement is None:
        return []
    rewarded = zip(chunk.candidates, chunk.judgement.rewards, strict=True)
    return [(candidate, reward) for candidate, reward in rewarded if candidate.token_ids and reward is not None]
