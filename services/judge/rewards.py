"""From the criteria's scores to one reward per candidate. Pure.

    rules = {"quality": Rule(weight=1.0), "safety": Rule(weight=0.0, threshold=0.5)}
    combine({"quality": [0.9, 0.2], "safety": [0.1, 1.0]}, rules)     # Rewards([0.9, 0.2], barred=(0,))

Joint optimisation of several criteria is their weighted mean. The paper (arXiv 2601.21343) adds them up and leaves the
rest open: thresholds and normalisation within the chunk are ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev

from shared.judge_settings import CriterionSettings, Normalisation

Column = Sequence[float | None]
"""A score in [0, 1] per candidate; None where the criterion could not tell."""


@dataclass(frozen=True)
class Rule:
    weight: float = 1.0
    threshold: float | None = None
    normalise: Normalisation = "none"

    @classmethod
    def of(cls, settings: CriterionSettings) -> "Rule":
        return cls(settings.weight, settings.threshold, settings.normalise)


@dataclass(frozen=True)
class Rewards:
    rewards: list[float | None]
    """In [0, 1]. None: some criterion has no score, so the mean would not be comparable."""
    barred: tuple[int, ...]
    """Candidates below a threshold."""


def combine(scores: Mapping[str, Column], rules: Mapping[str, Rule]) -> Rewards:
    """Per candidate the weighted mean of its normalised scores. Thresholds look at the scores themselves."""
    num_candidates = len(next(iter(scores.values())))
    total = math.fsum(rules[name].weight for name in scores)
    columns = {name: normalised(column, rules[name].normalise) for name, column in scores.items()}
    weights = {name: rules[name].weight / total if total else 1 / len(scores) for name in scores}
    rewards = [
        _weighted([(weights[name], column[place]) for name, column in columns.items()])
        for place in range(num_candidates)
    ]
    barred = (
        place for place in range(num_candidates) if any(_fails(scores[name][place], rules[name]) for name in scores)
    )
    return Rewards(rewards, tuple(barred))


def _weighted(parts: Sequence[tuple[float, float | None]]) -> float | None:
    """A criterion of weight 0 must have a score too: its threshold could not be checked otherwise."""
    known = [(weight, score) for weight, score in parts if score is not None]
    return min(1.0, math.fsum(weight * score for weight, score in known)) if len(known) == len(parts) else None


def _fails(score: float | None, rule: Rule) -> bool:
    return rule.threshold is not None and score is not None and score < rule.threshold


def normalised(column: Column, how: Normalisation) -> list[float | None]:
    """Into [0, 1] within the chunk; missing scores stay missing and count nowhere."""
    known = [score for score in column if score is not None]
    rescale = _RESCALE[how](known) if known else _as_it_is(known)
    return [None if score is None else rescale(score) for score in column]


def _as_it_is(_known: Sequence[float]) -> Callable[[float], float]:
    return lambda score: score


def _range(known: Sequence[float]) -> Callable[[float], float]:
    lowest, highest = min(known), max(known)
    return lambda score: (score - lowest) / (highest - lowest) if highest > lowest else 0.5


def _rank(known: Sequence[float]) -> Callable[[float], float]:
    """The share of the others that are below, a tie counting half."""

    def of(score: float) -> float:
        below = sum(other < score for other in known)
        equal = sum(other == score for other in known) - 1
        return (below + equal / 2) / (len(known) - 1) if len(known) > 1 else 0.5

    return of


def _deviation(known: Sequence[float]) -> Callable[[float], float]:
    mean, deviation = fmean(known), pstdev(known)
    return NormalDist(mean, deviation).cdf if deviation > 0 else lambda _score: 0.5


_RESCALE: Mapping[Normalisation, Callable[[Sequence[float]], Callable[[float], float]]] = {
    "none": _as_it_is,
    "range": _range,
    "rank": _rank,
    "deviation": _deviation,
}
