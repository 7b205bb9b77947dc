"""What verdicts on pairs say about the candidates' utilities: their posterior, as the tournament uses it. Pure numpy.

Utilities are in units of the judge's logits. Sampled verdicts are coin flips of a Bradley-Terry model with a bias for
the first place,

    P(first wins) = sigmoid(utility[first] - utility[second] + bias),

whose posterior under Gaussian priors is approximated at its peak (Laplace). Graded verdicts are measurements of the
same logit with a Gaussian error, the judge's whim; there the posterior is exact (least squares).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BIAS_DEVIATION = 0.5
"""Of the bias in one chunk about the judge's mean bias, in logits."""
MAX_LOGIT = 12.0
"""Verdicts nearer to 0 or 1 than 6e-6 count as that: beyond it a probability's error is larger than its logit says."""
_MAX_NEWTON_STEPS = 25
_MAX_STEP = 4.0
_LAST_STEP = 0.01
"""Newton's method ends after a step that moves no utility further than this, in logits: the next would move them by
about its square."""


@dataclass(frozen=True)
class Match:
    """One call: two candidates by their places, in the order in which the judge is shown them."""

    first: int
    second: int


@dataclass(frozen=True)
class Result:
    match: Match
    value: float | None
    """How far `first` beats `second`, in [0, 1]. None: no verdict could be read, which is no evidence."""


@dataclass(frozen=True)
class Temper:
    """What is known of a judge's habits before a chunk, all in logits. `Tempers` learns it."""

    sharpness: float = 2.0
    """Deviation of the candidates' utilities: how far the judge tells them apart."""
    whim: float = 1.0
    """Deviation of a graded verdict from what the utilities say; asking again brings the same."""
    bias: float = 0.0
    """For the one that is shown first."""


@dataclass(frozen=True)
class Table:
    """Readable verdicts summed by ordered pair, both (n, n): row is the one shown first."""

    played: Floats
    values: Floats


@dataclass(frozen=True)
class Posterior:
    """A Gaussian over the n utilities and the bias, in logits."""

    mean: Floats
    """(n + 1,): the bias comes last."""
    covariance: Floats
    """(n + 1, n + 1)"""

    @property
    def utilities(self) -> Floats:
        """(n,)"""
        return self.mean[:-1]

    @property
    def bias(self) -> float:
        return float(self.mean[-1])

    def mean_wins(self) -> tuple[Floats, Floats]:
        """Each candidate's mean of P(wins) over all the others without the bias, and its deviation, both (n,)."""
        size = len(self.mean) - 1
        wins = sigmoid(self.utilities[:, None] - self.utilities)
        slopes = -wins * (1.0 - wins)
        np.fill_diagonal(slopes, 0.0)
        np.fill_diagonal(slopes, -slopes.sum(1))
        variances = ((slopes @ self.covariance[:size, :size]) * slopes).sum(1)
        return (wins.sum(1) - 0.5) / (size - 1), np.sqrt(variances.clip(0.0)) / (size - 1)

    def draw(self, generator: np.random.Generator, num_draws: int) -> Floats:
        """Utilities (num_draws, n)."""
        size = len(self.mean) - 1
        root = np.linalg.cholesky(self.covariance[:size, :size])
        return self.mean[:size] + generator.standard_normal((num_draws, size)) @ root.T


def tabulate(results: Sequence[Result], num_candidates: int, *, graded: bool) -> Table:
    """Values are summed as they are, or as logits if `graded`."""
    read = [result for result in results if result.value is not None]
    places = np.array([result.match.first * num_candidates + result.match.second for result in read], dtype=np.intp)
    values = np.array([result.value for result in read], dtype=np.float64)
    shape, num_cells = (num_candidates, num_candidates), num_candidates**2
    return Table(
        np.bincount(places, minlength=num_cells).astype(np.float64).reshape(shape),
        np.bincount(places, logits(values) if graded else values, minlength=num_cells)
        .astype(np.float64)
        .reshape(shape),
    )


def logits(values: Floats) -> Floats:
    """Of verdicts in [0, 1], within MAX_LOGIT on both sides."""
    edge = 1.0 / (1.0 + np.exp(MAX_LOGIT))
    inside = np.clip(values, edge, 1.0 - edge)
    return np.log(inside) - np.log1p(-inside)


def sigmoid(logit: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-logit))


def fit(table: Table, temper: Temper, *, graded: bool) -> Posterior:
    """Prior: utilities ~ N(0, sharpness), bias ~ N(temper.bias, BIAS_DEVIATION). Same table, same posterior."""
    size = len(table.played)
    prior = np.full(size + 1, temper.sharpness**-2)
    prior[-1] = BIAS_DEVIATION**-2
    centre = np.zeros(size + 1)
    centre[-1] = temper.bias
    mean = centre.copy()
    for _ in range(_MAX_NEWTON_STEPS):
        surprise, weights = _evidence(table, mean, whim=temper.whim if graded else None)
        precision = _information(weights, prior)
        slope = np.append(surprise.sum(1) - surprise.sum(0), surprise.sum()) - prior * (mean - centre)
        step = np.linalg.solve(precision, slope)
        length = np.abs(step).max()
        mean += step if graded else step * min(1.0, _MAX_STEP / max(length, _LAST_STEP))
        if graded or length < _LAST_STEP:
            break
    covariance: Floats = np.linalg.inv(precision).astype(np.float64, copy=False)
    return Posterior(mean, covariance)


def _evidence(table: Table, mean: Floats, *, whim: float | None) -> tuple[Floats, Floats]:
    """First derivatives of the log-likelihood by the logits of ordered pairs, and its second ones negated, (n, n)."""
    logit = mean[:-1, None] - mean[:-1] + mean[-1]
    if whim is not None:
        return (table.values - table.played * logit) * whim**-2, table.played * whim**-2
    expected = sigmoid(logit)
    return table.values - table.played * expected, table.played * (expected * (1.0 - expected))


def _information(weights: Floats, prior: Floats) -> Floats:
    """(n + 1, n + 1): of matches that weigh `weights` (n, n) and a prior of precisions `prior` (n + 1,)."""
    size = len(weights)
    shown_first, shown_second = weights.sum(1), weights.sum(0)
    precision = np.zeros((size + 1, size + 1))
    precision[:size, :size] = -weights - weights.T
    precision[:size, size] = precision[size, :size] = shown_first - shown_second
    diagonal = precision.reshape(-1)[:: size + 2]  # a view
    diagonal[:] = prior
    diagonal[:size] += shown_first + shown_second
    diagonal[size] += shown_first.sum()
    return precision
