"""The tournament among a chunk's candidates: plays what matters for the best and the worst, until both are sure.

Round 1 is a random cycle (two of sampled verdicts if the budget has the room), in which everyone is shown first as
often as second. Each later round plays pairs in proportion to a power of their worth: the expected gain in utility of
the one that would be chosen (or, at the other end, rejected) if the pair were played several times,

    E[max mean after] - max mean now,

in closed form from the Gaussian posterior (knowledge gradient with correlated beliefs, Frazier et al. 2009; looking
more than one match ahead: the KG(*) of Frazier & Powell 2010). Differences from the textbook form: only the likeliest
contenders of each end are looked at, and a round draws its pairs rather than taking the best one, so that its matches
are independent. benchmarks/tournament.py has what it reaches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from services.judge.posterior import Floats, Match, Posterior, Result, Temper, fit, sigmoid, tabulate

SURE = 0.99
"""A tournament ends when it expects this share of the best possible spread between chosen and rejected."""
MOST_ROUNDS = 8
"""A budget is spent in about this many. More and narrower ones choose slightly better, and a chunk takes longer."""
_NUM_DRAWS = 128
_MAX_CONTENDERS = 10
"""At each end. The other candidates are almost never the best, and the work grows with the cube of this."""
_LOOKAHEAD = {False: 20.0, True: 5.0}
"""How many matches of a pair its worth supposes, by whether verdicts are graded."""
_GREED = 3.0
"""A pair is drawn in proportion to its worth to this power."""
_MIN_WORTH = 1e-12
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(5)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of candidates and what each is worth, all (p,)."""

    first: np.typing.NDArray[np.intp]
    second: np.typing.NDArray[np.intp]
    worth: Floats


@dataclass(frozen=True)
class Pairing:
    """Chooses the matches of a tournament's rounds. The same results, seed and temper bring the same matches."""

    num_candidates: int
    graded: bool
    """An ordered pair is then asked about once: asking again would bring the same."""
    budget: int
    """Calls in all."""
    seed: int
    temper: Temper

    def next_round(self, results: Sequence[Result]) -> list[Match]:
        """Empty: both ends are sure, or the budget is spent."""
        left = self.budget - len(results)
        if left <= 0 or self.num_candidates < 2:
            return []
        generator = np.random.default_rng((self.seed, len(results)))
        if not results:
            return self._first_round(generator)[:left]
        posterior = self.posterior(results)
        if share_of_spread(posterior, generator) >= SURE:
            return []
        first = self._num_first_cycles * self.num_candidates
        width = min(left, ceil(max(1, self.budget - first) / (MOST_ROUNDS - 1)))
        pairs = pair_worths(posterior, None if not self.graded else self.temper.whim)
        if self.graded:
            return self._unplayed(pairs, results, generator=generator, width=width)
        return self._repeatable(pairs, results, generator=generator, width=width)

    def posterior(self, results: Sequence[Result]) -> Posterior:
        return fit(tabulate(results, self.num_candidates, graded=self.graded), self.temper, graded=self.graded)

    @property
    def _num_first_cycles(self) -> int:
        """Coin flips need more before a choice of pairs pays, if the budget has the room."""
        return 1 if self.graded or self.budget < 4 * self.num_candidates else 2

    def _first_round(self, generator: np.random.Generator) -> list[Match]:
        cycles = [generator.permutation(self.num_candidates) for _ in range(self._num_first_cycles)]
        return [
            Match(int(first), int(second))
            for cycle in cycles
            for first, second in zip(cycle, np.roll(cycle, -1), strict=True)
        ]

    def _repeatable(
        self, pairs: Pairs, results: Sequence[Result], *, generator: np.random.Generator, width: int
    ) -> list[Match]:
        """Systematic draws: a pair comes as often as its share of all worths says, rounded up or down."""
        shares = np.cumsum(pairs.worth**_GREED)
        marks = (np.arange(width) + generator.random()) * (shares[-1] / width)
        drawn = np.minimum(np.searchsorted(shares, marks), len(shares) - 1)
        lead = _leads(results, self.num_candidates)
        couples = zip(pairs.first[drawn].tolist(), pairs.second[drawn].tolist(), generator.random(width), strict=True)
        return [_in_order(one, other, lead, coin=coin) for one, other, coin in couples]

    def _unplayed(
        self, pairs: Pairs, results: Sequence[Result], *, generator: np.random.Generator, width: int
    ) -> list[Match]:
        """Draws without replacement (exponential race) among the ordered pairs that were not asked about."""
        played = {(result.match.first, result.match.second) for result in results}
        lead = _leads(results, self.num_candidates)
        arrivals = generator.exponential(size=len(pairs.worth)) / pairs.worth**_GREED
        chosen: list[Match] = []
        for place in np.argsort(arrivals):
            match = _in_order(int(pairs.first[place]), int(pairs.second[place]), lead, coin=generator.random())
            turned = Match(match.second, match.first)
            new = [one for one in (match, turned) if (one.first, one.second) not in played][:1]
            played.update((one.first, one.second) for one in new)
            chosen += new
            if len(chosen) == width:
                return chosen
        return chosen or self._any_unplayed(played, generator)[:width]

    def _any_unplayed(self, played: set[tuple[int, int]], generator: np.random.Generator) -> list[Match]:
        """In random order, when the contenders have all met."""
        order = generator.permutation(self.num_candidates).tolist()
        return [Match(one, other) for one in order for other in order if one != other and (one, other) not in played]


def share_of_spread(posterior: Posterior, generator: np.random.Generator) -> float:
    """Expected (utility of chosen - utility of rejected) / (highest - lowest), if chosen by the posterior's mean."""
    return share_of_choice(posterior, posterior.utilities, generator=generator)


def share_of_choice(posterior: Posterior, scores: Floats, *, generator: np.random.Generator) -> float:
    """The same, if the highest of `scores` (n,) is chosen and the lowest rejected; at least two candidates."""
    drawn = posterior.draw(generator, _NUM_DRAWS)
    spread = drawn.max(1) - drawn.min(1)
    return float(((drawn[:, scores.argmax()] - drawn[:, scores.argmin()]) / spread).mean())


def pair_worths(posterior: Posterior, whim: float | None) -> Pairs:
    """Pairs of the upper end's contenders, then of the lower end's. `whim` of graded verdicts, None: sampled ones."""
    size = len(posterior.utilities)
    num_contenders = min(size, _MAX_CONTENDERS)
    deviation = np.sqrt(posterior.covariance.diagonal()[:size])
    upper = np.argsort(-posterior.utilities - deviation, kind="stable")[:num_contenders]
    lower = np.argsort(posterior.utilities - deviation, kind="stable")[:num_contenders]
    ends = np.stack([upper, lower])  # (2, m)
    one, other = np.triu_indices(num_contenders, 1)  # (p,)
    mean = np.stack([posterior.utilities[upper], -posterior.utilities[lower]])
    covariance = posterior.covariance[ends[:, :, None], ends[:, None, :]]  # (2, m, m)
    contrast = covariance[:, :, one] - covariance[:, :, other]  # (2, m, p)
    places = np.arange(len(one))
    variance = contrast[:, one, places] - contrast[:, other, places]  # (2, p)
    expected = sigmoid(mean[:, one] - mean[:, other])
    information = expected * (1.0 - expected) if whim is None else whim**-2
    noise = 1.0 / (_LOOKAHEAD[whim is not None] * information)
    movement = contrast / np.sqrt(variance + noise)[:, None]
    after = (mean[:, :, None, None] + movement[..., None] * _NODES).max(1) @ _WEIGHTS  # (2, p)
    worth = np.maximum(after - mean.max(1, keepdims=True), _MIN_WORTH)
    return Pairs(ends[:, one].ravel(), ends[:, other].ravel(), worth.ravel())


def _leads(results: Sequence[Result], num_candidates: int) -> list[int]:
    """How much more often each candidate was shown first than second."""
    lead = [0] * num_candidates
    for result in results:
        lead[result.match.first] += 1
        lead[result.match.second] -= 1
    return lead


def _in_order(one: int, other: int, lead: list[int], *, coin: float) -> Match:
    """The one that was shown first less often comes first; `lead` is brought up to date."""
    if lead[one] > lead[other] or (lead[one] == lead[other] and coin < 0.5):
        one, other = other, one
    lead[one] += 1
    lead[other] -= 1
    return Match(one, other)
