"""Simulated candidates and judges for benchmarks/tournament.py, and the schedules that are played in them."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from services.judge.posterior import Floats, Match, Result, Temper
from services.judge.schedules import Schedule, make_schedule, win_rates
from services.judge.tempers import Tempers
from shared.judge_settings import ScheduleName


@dataclass(frozen=True)
class Setting:
    """A judge and its candidates: utilities u of variance 1, first wins with sigmoid(k (u_i - u_j) + bias + ...)."""

    name: str
    sharpness: float = 2.0
    whim: float | None = None
    """Of a graded judge, for each ordered pair; None: verdicts are sampled."""
    bias: float = 0.3
    num_candidates: int = 18
    shape: str = "normal"
    """Of the utilities: `normal`; `heavy` tails (Student's t, 3 degrees); `near_ties` (four candidates within 0.1 at
    each end); `clusters` (three texts and their near copies, as of a collapsed policy)."""
    intransitivity: float = 0.0
    """Deviation of a taste for one of the two, by pair, in units of utility."""
    lapses: float = 0.0
    """Share of verdicts that are a coin flip."""


@dataclass(frozen=True)
class World:
    utilities: Floats
    chances: Floats
    """(n, n): that the row wins, shown first."""

    def share(self, scores: Floats) -> float:
        """Of the best possible spread, by a choice of the highest and the lowest score."""
        chosen, rejected = self.utilities[np.nanargmax(scores)], self.utilities[np.nanargmin(scores)]
        return float((chosen - rejected) / (self.utilities.max() - self.utilities.min()))


def world_of(setting: Setting, seed: int) -> World:
    draw = np.random.default_rng((seed, 1))
    size = setting.num_candidates
    utilities = _utilities(setting.shape, size, draw)
    taste = np.triu(draw.normal(0.0, 1.0, (size, size)), 1) * setting.intransitivity
    contrast = utilities[:, None] - utilities + taste - taste.T
    whim = draw.normal(0.0, 1.0, (size, size)) * (setting.whim or 0.0)
    chances = 1.0 / (1.0 + np.exp(-(setting.sharpness * contrast + setting.bias + whim)))
    return World(utilities, (1.0 - setting.lapses) * chances + setting.lapses / 2)


def _utilities(shape: str, size: int, draw: np.random.Generator) -> Floats:
    if shape == "heavy":
        heavy: Floats = draw.standard_t(3, size) / np.sqrt(3.0)
        return heavy
    utilities: Floats = draw.standard_normal(size)
    if shape == "near_ties":
        order, few = np.argsort(utilities), max(1, min(4, size // 3))
        utilities[order[:few]] = utilities[order[0]] + draw.uniform(0.0, 0.1, few)
        utilities[order[-few:]] = utilities[order[-1]] - draw.uniform(0.0, 0.1, few)
    if shape == "clusters":
        utilities = utilities[draw.integers(0, min(3, size), size)] + draw.normal(0.0, 0.05, size)
    return utilities


@dataclass(frozen=True)
class Swiss:
    """Neighbours by win rate meet, in random order; scores are win rates."""

    num_candidates: int
    budget: int
    seed: int

    def next_matches(self, results: list[Result]) -> list[Match]:
        draw = np.random.default_rng((self.seed, len(results)))
        rates = np.array(win_rates(results, self.num_candidates), dtype=float)
        order = np.argsort(np.nan_to_num(rates, nan=0.5) + draw.uniform(0.0, 1e-6, len(rates)))
        pairs = [draw.permutation(order[place : place + 2]).tolist() for place in range(0, len(order) - 1, 2)]
        return [Match(*pair) for pair in pairs][: max(0, self.budget - len(results))]


@dataclass(frozen=True)
class Entrant:
    """A schedule of the product with its settings, or `swiss`, a peer that only this benchmark has."""

    name: ScheduleName | str
    budget: int = 0
    samples: int = 5

    def schedule(self, setting: Setting, *, seed: int, temper: Temper) -> Schedule | Swiss:
        if self.name == "swiss":
            return Swiss(setting.num_candidates, self.budget, seed)
        name: ScheduleName = (
            "pivot" if self.name == "pivot" else "all_pairs" if self.name == "all_pairs" else "tournament"
        )
        return make_schedule(
            name,
            setting.num_candidates,
            graded=setting.whim is not None,
            budget=self.budget,
            samples=self.samples,
            seed=seed,
            temper=temper,
        )


@dataclass(frozen=True)
class Outcome:
    """Means over the chunks of one entrant in one setting."""

    share: float
    error: float
    """Standard error of the share."""
    expected_share: float
    """As the posterior said; 0 for a peer without one."""
    calls: float
    most_calls: int
    rounds: float
    most_rounds: int
    cpu_ms: float
    """Of the schedule and its learning, a chunk."""


def play(setting: Setting, entrant: Entrant, *, num_chunks: int, clock: Callable[[], float]) -> Outcome:
    """Chunk after chunk with a temper that is learned on the way, as in a run. The same seeds for every entrant."""
    tempers = Tempers(graded=setting.whim is not None)
    shares, expected, calls, rounds = [], [], [], []
    cpu_s = 0.0
    for seed in range(num_chunks):
        world, coins = world_of(setting, seed), np.random.default_rng((seed, 2))
        schedule = entrant.schedule(setting, seed=seed, temper=tempers.temper)
        results: list[Result] = []
        num_rounds = 0
        began = clock()
        while matches := schedule.next_matches(results):
            cpu_s += clock() - began
            results += [_result(world, match, coins, graded=setting.whim is not None) for match in matches]
            num_rounds += 1
            began = clock()
        if isinstance(schedule, Swiss):
            scores, known = win_rates(results, setting.num_candidates), 0.0
        else:
            standing = schedule.standing(results)
            scores, known = list(standing.scores), standing.expected_share
            tempers.learn(results, setting.num_candidates)
        cpu_s += clock() - began
        shares.append(world.share(np.array(scores, dtype=float)))
        expected.append(known)
        calls.append(len(results))
        rounds.append(num_rounds)
    error = float(np.std(shares) / np.sqrt(num_chunks))
    spent = 1e3 * cpu_s / num_chunks
    return Outcome(
        fmean(shares), error, fmean(expected), fmean(calls), max(calls), fmean(rounds), max(rounds), cpu_ms=spent
    )


def _result(world: World, match: Match, coins: np.random.Generator, *, graded: bool) -> Result:
    chance = float(world.chances[match.first, match.second])
    return Result(match, chance if graded else float(coins.random() < chance))
