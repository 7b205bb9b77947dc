"""How far two judges agree about the same recorded candidates. Pure; judge_compare.py asks and prints.

Ties are drawn evenly, as the trainer does (trainer/preferences.py): where one judge has two best candidates and the
other has one of them, they agree by half.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from cli.judge_figures import Share
from shared.recordings import RecordedCandidate, RecordedChunk
from shared.records import CANDIDATE_KINDS

Rewards = Sequence[float | None]


@dataclass(frozen=True)
class Opinion:
    """What one judge said about one chunk."""

    rewards: tuple[float | None, ...]
    barred: frozenset[int] = frozenset()
    """By place: never chosen."""

    @property
    def best(self) -> list[int]:
        """The places that the chosen one is drawn from; empty: none."""
        return _extreme(self.rewards, [i for i in range(len(self.rewards)) if i not in self.barred], highest=True)

    @property
    def worst(self) -> list[int]:
        return _extreme(self.rewards, range(len(self.rewards)), highest=False)

    @property
    def pair(self) -> tuple[int, int] | None:
        """Chosen and rejected, the first of each; None without a preference."""
        if not self.best or not self.worst or self.best[0] in self.worst:
            return None
        return self.best[0], self.worst[0]


def _extreme(rewards: Rewards, places: Iterable[int], *, highest: bool) -> list[int]:
    known = {place: reward for place in places if (reward := rewards[place]) is not None}
    wanted = (max if highest else min)(known.values(), default=None)
    return [place for place, reward in known.items() if reward == wanted]


@dataclass(frozen=True)
class Replay:
    """One recorded chunk, and what the other judge said about it."""

    chunk: RecordedChunk
    now: Opinion | None
    """None: it failed, for this reason."""
    reason: str = ""
    num_calls: int = 0

    @property
    def then(self) -> Opinion:
        barred = (place for place, candidate in enumerate(self.chunk.candidates) if candidate.barred)
        return Opinion(tuple(candidate.reward for candidate in self.chunk.candidates), frozenset(barred))

    @property
    def flip(self) -> "Flip | None":
        """The pair that the run trained on, if the other judge has it the other way round."""
        if self.now is None or (pair := self.then.pair) is None:
            return None
        chosen, rejected = (self.now.rewards[place] for place in pair)
        if chosen is None or rejected is None or chosen >= rejected:
            return None
        better, worse = (self.chunk.candidates[place] for place in pair)
        return Flip(self.chunk, better, worse, gap=rejected - chosen)


@dataclass(frozen=True)
class Flip:
    chunk: RecordedChunk
    chosen: RecordedCandidate
    """By the run's judge."""
    rejected: RecordedCandidate
    gap: float
    """How much more the other judge gives to `rejected`."""

    def as_data(self) -> dict[str, Any]:
        prefix = self.chunk.text[: self.chunk.text_start]
        where = {"window": self.chunk.window_id, "start": self.chunk.start, "prefix": prefix[-500:]}
        return where | {"chosen": self.chosen.text, "rejected": self.rejected.text, "gap": self.gap}


@dataclass(frozen=True)
class Agreement:
    chosen: Share
    """Chunks in which both would choose the same candidate."""
    rejected: Share
    orders: Share
    """Pairs of candidates that both put into the same order, of those that neither calls equal. Pairs of one chunk
    depend on each other: the interval would be too narrow."""
    flipped: Share
    """Of the pairs that the run trained on, those that the other judge has the other way round."""
    correlation: float | None
    """Spearman's, of the rewards within a chunk; mean over the chunks in which both judges differ among candidates."""
    chosen_kinds: dict[str, tuple[float, float]]
    """Kind -> share of chosen candidates that are of it, then and now."""

    def as_data(self) -> dict[str, Any]:
        shares = {name: getattr(self, name).as_data() for name in ("chosen", "rejected", "flipped")}
        shares["orders"] = {"value": self.orders.mean if self.orders.number else None, "number": self.orders.number}
        kinds = {kind: {"then": then, "now": now} for kind, (then, now) in self.chosen_kinds.items()}
        return shares | {"rank_correlation": self.correlation, "chosen_kinds": kinds}


def agreement_of(replays: Sequence[Replay]) -> Agreement:
    """Of those that did not fail."""
    both = [(replay.then, replay.now, replay.chunk) for replay in replays if replay.now is not None]
    ranks = [found for then, now, _ in both if (found := rank_correlation(then.rewards, now.rewards)) is not None]
    trained = [replay for replay in replays if replay.now is not None and replay.then.pair is not None]
    return Agreement(
        chosen=Share.of(_chance(then.best, now.best) for then, now, _ in both if then.best and now.best),
        rejected=Share.of(_chance(then.worst, now.worst) for then, now, _ in both if then.worst and now.worst),
        orders=Share.of(same for then, now, _ in both for same in _orders(then.rewards, now.rewards)),
        flipped=Share.of(float(replay.flip is not None) for replay in trained),
        correlation=math.fsum(ranks) / len(ranks) if ranks else None,
        chosen_kinds={
            kind: (
                _share_of_kind(kind, [(chunk, then) for then, _, chunk in both]),
                _share_of_kind(kind, [(chunk, now) for _, now, chunk in both]),
            )
            for kind in CANDIDATE_KINDS
        },
    )


def _chance(one: Sequence[int], other: Sequence[int]) -> float:
    """That even draws from both are the same candidate."""
    return len(set(one) & set(other)) / (len(one) * len(other))


def _orders(then: Rewards, now: Rewards) -> Iterable[float]:
    for a, b in combinations(range(len(then)), 2):
        signs = [_sign(rewards[a], rewards[b]) for rewards in (then, now)]
        if all(signs):
            yield float(signs[0] == signs[1])


def _sign(a: float | None, b: float | None) -> int:
    """0 for a tie, and where a reward is missing."""
    return 0 if a is None or b is None else (a > b) - (a < b)


def rank_correlation(then: Rewards, now: Rewards) -> float | None:
    """Spearman's, ties with their mean rank; None if fewer than two are known to both, or one ties all."""
    known = [(a, b) for a, b in zip(then, now, strict=True) if a is not None and b is not None]
    if len(known) < 2:
        return None
    one, other = (_ranks(values) for values in zip(*known, strict=True))
    middle = (len(known) - 1) / 2
    spreads = [math.fsum((rank - middle) ** 2 for rank in ranks) for ranks in (one, other)]
    if not all(spreads):
        return None
    shared = math.fsum((a - middle) * (b - middle) for a, b in zip(one, other, strict=True))
    return shared / math.sqrt(spreads[0] * spreads[1])


def _ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of their ranks."""
    return [sum(o < v for o in values) + (sum(o == v for o in values) - 1) / 2 for v in values]


def _share_of_kind(kind: str, opinions: Sequence[tuple[RecordedChunk, Opinion]]) -> float:
    shares = []
    for chunk, opinion in opinions:
        if opinion.best:
            shares.append(sum(kind in chunk.candidates[place].kinds for place in opinion.best) / len(opinion.best))
    return sum(shares) / len(shares) if shares else 0.0
