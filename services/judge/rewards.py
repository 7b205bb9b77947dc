"""From verdicts to scores, from scores to rewards: the arithmetic of the judge. Pure."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from services.judge.pairing import Pair


def win_rates(num_candidates: int, outcomes: Mapping[Pair, float]) -> list[float]:
    """Per candidate the mean over its comparisons: `outcomes[i, j]` in [0, 1] is how far i beat j, j gets the rest."""
    won: list[list[float]] = [[] for _ in range(num_candidates)]
    for (first, second), outcome in outcomes.items():
        won[first].append(outcome)
        won[second].append(1.0 - outcome)
    return [fmean(results) for results in won]


def scores_within_group(values: Sequence[float], *, scale: float) -> list[float]:
    """sigmoid((value - mean of the group) / scale): 0.5 for the mean, above it for the better ones."""
    mean = fmean(values)
    return [_sigmoid((value - mean) / scale) for value in values]


def combined_rewards(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Weighted mean over the criteria for every candidate."""
    total = math.fsum(weights[name] for name in scores)
    columns = zip(*scores.values(), strict=True)
    shares = [weights[name] / total for name in scores]
    return [
        min(1.0, math.fsum(share * score for share, score in zip(shares, column, strict=True))) for column in columns
    ]


def _sigmoid(x: float) -> float:
    """Without overflow for large negative x."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
