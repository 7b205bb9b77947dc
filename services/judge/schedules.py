"""Which pairs of a chunk's candidates the judge is asked about, and what its verdicts say. Pure: no I/O, seeded.

    schedule = make_schedule("tournament", 18, graded=False, budget=0, samples=5, seed=7, temper=Temper())
    results = []
    while matches := schedule.next_matches(results):         # one round: its matches are independent
        results += [Result(match, value_of(match)) for match in matches]
    schedule.standing(results).scores                        # mean of wins, in [0, 1]

`all_pairs` and `pivot` ask everything in one round; the tournament is in services/judge/tournament.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np

from services.judge.posterior import Floats, Match, Posterior, Result, Temper, fit, sigmoid, tabulate
from services.judge.tournament import Pairing, share_of_choice
from shared.judge_settings import ScheduleName

SAMPLED_CALLS, GRADED_CALLS = 8.5, 4.25
"""Default budget of a tournament, in calls a candidate: of 18 candidates 153 and 76 calls."""
_SIMULATED_CALLS = 40_000
"""`expected_share` simulates about this many in all, a second or two."""


@dataclass(frozen=True)
class Standing:
    """What is known of the candidates, in their order."""

    scores: tuple[float | None, ...]
    """Mean of wins over all the others, in [0, 1]. None: no verdict about it could be read."""
    deviations: tuple[float | None, ...]
    """Of the scores, by the posterior."""
    expected_share: float
    """Of the best possible spread between chosen and rejected, by the posterior."""


class Schedule(Protocol):
    def next_matches(self, results: Sequence[Result]) -> list[Match]:
        """One round, whose matches can be asked about at once; empty: done. `results` are all so far, in any order."""
        ...

    def standing(self, results: Sequence[Result]) -> Standing: ...


@dataclass(frozen=True)
class Tournament:
    """Scores are the mean of wins on the fitted utilities, so that they compare with those of all pairs."""

    pairing: Pairing

    def next_matches(self, results: Sequence[Result]) -> list[Match]:
        return self.pairing.next_round(results)

    def standing(self, results: Sequence[Result]) -> Standing:
        num_candidates = self.pairing.num_candidates
        if num_candidates < 2:
            return _nothing_to_compare(num_candidates)
        posterior = self.pairing.posterior(results)
        scores, _ = posterior.mean_wins()
        read = [result.match for result in results if result.value is not None]
        known = {match.first for match in read} | {match.second for match in read}
        shown = [float(scores[place]) if place in known else None for place in range(num_candidates)]
        return _standing(shown, posterior)


@dataclass(frozen=True)
class FixedPairs:
    """Asks about given pairs, all in one round. Scores are plain means of wins over the readable results."""

    num_candidates: int
    pairs: tuple[tuple[int, int], ...]
    num_there: int
    """Verdicts on (a, b), and below on (b, a); of an odd number the seed says which order has more."""
    num_back: int
    graded: bool
    seed: int
    temper: Temper

    def next_matches(self, results: Sequence[Result]) -> list[Match]:
        if results or not self.pairs:
            return []
        turned = np.random.default_rng(self.seed).random(len(self.pairs)) < 0.5
        matches: list[Match] = []
        for (one, other), turn in zip(self.pairs, turned, strict=True):
            first, second = (other, one) if turn else (one, other)
            matches += [Match(first, second)] * self.num_there + [Match(second, first)] * self.num_back
        return matches

    def standing(self, results: Sequence[Result]) -> Standing:
        if self.num_candidates < 2:
            return _nothing_to_compare(self.num_candidates)
        table = tabulate(results, self.num_candidates, graded=self.graded)
        return _standing(win_rates(results, self.num_candidates), fit(table, self.temper, graded=self.graded))


def win_rates(results: Sequence[Result], num_candidates: int) -> list[float | None]:
    """Per candidate the mean over its rivals of how far it beats them; None without a readable result.

    A pair's two orders weigh the same, however often each was asked: a judge that always prefers the first text makes
    ties. (0, 1) read 1, 1 and (1, 0) read 1 give both 0.5.
    """
    table = tabulate(results, num_candidates, graded=False)
    orders = (table.played > 0).astype(float)
    means = np.divide(table.values, table.played, out=np.zeros_like(table.values), where=table.played > 0)
    seen = orders + orders.T
    wins = np.divide(means + (orders - means).T, seen, out=np.zeros_like(means), where=seen > 0)
    rivals = (seen > 0).sum(1)
    return [float(wins[place].sum() / num) if num else None for place, num in enumerate(rivals)]


def make_schedule(
    name: ScheduleName,
    num_candidates: int,
    *,
    graded: bool,
    budget: int,
    samples: int,
    seed: int,
    temper: Temper,
) -> Schedule:
    """`budget` as in the settings; `samples` are verdicts a pair, of which a tournament knows nothing."""
    if name == "tournament":
        calls = most_calls(name, num_candidates, graded=graded, budget=budget, samples=samples)
        return Tournament(Pairing(num_candidates, graded=graded, budget=calls, seed=seed, temper=temper))
    per_pair = _calls_per_pair(graded=graded, samples=samples)
    return FixedPairs(
        num_candidates,
        _pairs(name, num_candidates),
        num_there=per_pair - per_pair // 2,
        num_back=per_pair // 2,
        graded=graded,
        seed=seed,
        temper=temper,
    )


def most_calls(name: ScheduleName, num_candidates: int, *, graded: bool, budget: int, samples: int) -> int:
    """What one chunk may cost. A tournament's default is never dearer than all pairs."""
    if name != "tournament":
        return len(_pairs(name, num_candidates)) * _calls_per_pair(graded=graded, samples=samples)
    num_pairs = num_candidates * (num_candidates - 1) // 2
    all_pairs = num_pairs * _calls_per_pair(graded=graded, samples=samples)
    wanted = budget or min(int((GRADED_CALLS if graded else SAMPLED_CALLS) * num_candidates), all_pairs)
    return min(wanted, 2 * num_pairs) if graded or not num_pairs else wanted


def expected_share(
    name: ScheduleName, num_candidates: int, *, graded: bool, budget: int, samples: int, temper: Temper
) -> float:
    """Mean share of the best possible spread that the choice reaches, simulated with a judge of this temper."""
    if num_candidates < 2:
        return 1.0
    calls = most_calls(name, num_candidates, graded=graded, budget=budget, samples=samples)
    shares = []
    for seed in range(max(10, min(200, _SIMULATED_CALLS // calls))):
        schedule = make_schedule(
            name, num_candidates, graded=graded, budget=budget, samples=samples, seed=seed, temper=temper
        )
        generator = np.random.default_rng(seed)
        utilities = generator.normal(0.0, temper.sharpness, num_candidates)
        results = _simulate(schedule, utilities, whim=temper.whim if graded else None, bias=temper.bias, seed=seed)
        scores = np.array(schedule.standing(results).scores, dtype=float)
        spread = utilities.max() - utilities.min()
        shares.append((utilities[np.nanargmax(scores)] - utilities[np.nanargmin(scores)]) / spread)
    return float(np.mean(shares))


def _simulate(schedule: Schedule, utilities: Floats, *, whim: float | None, bias: float, seed: int) -> list[Result]:
    generator = np.random.default_rng((seed, 1))
    size = len(utilities)
    logit = utilities[:, None] - utilities + bias + generator.normal(0.0, whim or 0.0, (size, size))
    wins = sigmoid(logit)
    results: list[Result] = []
    while matches := schedule.next_matches(results):
        for match in matches:
            chance = float(wins[match.first, match.second])
            results.append(Result(match, chance if whim is not None else float(generator.random() < chance)))
    return results


def _pairs(name: ScheduleName, num_candidates: int) -> tuple[tuple[int, int], ...]:
    """`pivot`: with the first candidate, which is the original wherever there is one."""
    if name == "pivot":
        return tuple((0, rival) for rival in range(1, num_candidates))
    return tuple(combinations(range(num_candidates), 2))


def _calls_per_pair(*, graded: bool, samples: int) -> int:
    """Graded verdicts come in both orders at least: nothing else evens out the bias."""
    return max(2, samples) if graded else samples


def _standing(scores: Sequence[float | None], posterior: Posterior) -> Standing:
    _, deviations = posterior.mean_wins()
    known = [place for place, score in enumerate(scores) if score is not None]
    filled = np.array([0.5 if score is None else score for score in scores])
    return Standing(
        tuple(scores),
        tuple(float(deviations[place]) if place in known else None for place in range(len(scores))),
        share_of_choice(posterior, filled, generator=np.random.default_rng(0)),
    )


def _nothing_to_compare(num_candidates: int) -> Standing:
    """One candidate: a tie with itself, since no verdict about it was wanted, so none is missing."""
    return Standing((0.5,) * num_candidates, (0.0,) * num_candidates, 1.0)
