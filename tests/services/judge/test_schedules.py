from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.judge.posterior import Match, Result, Temper
from services.judge.schedules import Schedule, Standing, expected_share, make_schedule, most_calls, win_rates
from services.judge.tournament import SURE
from shared.judge_settings import ScheduleName

NAMES: tuple[ScheduleName, ...] = ("tournament", "all_pairs", "pivot")
Judge = Callable[[Match], float | None]


def _schedule(
    name: ScheduleName = "tournament",
    num_candidates: int = 18,
    *,
    graded: bool = False,
    budget: int = 0,
    samples: int = 5,
    seed: int = 0,
    temper: Temper | None = None,
) -> Schedule:
    return make_schedule(
        name,
        num_candidates,
        graded=graded,
        budget=budget,
        samples=samples,
        seed=seed,
        temper=temper or Temper(),
    )


def _play(schedule: Schedule, judge: Judge) -> tuple[list[Result], int]:
    """Its results, and how many rounds they took."""
    results: list[Result] = []
    rounds = 0
    while matches := schedule.next_matches(results):
        results += [Result(match, judge(match)) for match in matches]
        rounds += 1
    return results, rounds


def _later_is_better(match: Match) -> float:
    return float(match.first > match.second)


def _graded(match: Match) -> float:
    return float(1 / (1 + np.exp(match.second - match.first - 0.4)))


def _results(*rows: tuple[int, int, float | None]) -> list[Result]:
    return [Result(Match(first, second), value) for first, second, value in rows]


def test_win_rates_by_hand() -> None:
    # 0 against 1: 2/3 there, 1 - 0 = 1 back, so 5/6; 0 against 2: 0.5; 1 against 2: unreadable.
    rows = _results((0, 1, 1.0), (0, 1, 1.0), (0, 1, 0.0), (1, 0, 0.0), (2, 0, 0.5), (1, 2, None))
    assert win_rates(rows, 4) == [pytest.approx((5 / 6 + 1 / 2) / 2), pytest.approx(1 / 6), 0.5, None]


def test_the_orders_of_a_pair_weigh_the_same() -> None:
    always_first = _results((0, 1, 1.0), (0, 1, 1.0), (0, 1, 1.0), (1, 0, 1.0), (1, 0, 1.0))
    assert win_rates(always_first, 2) == [0.5, 0.5]


def test_all_pairs_asks_each_pair_in_both_orders_and_reports_plain_win_rates() -> None:
    schedule = _schedule("all_pairs", 4)
    results, rounds = _play(schedule, _later_is_better)
    orders = Counter((result.match.first, result.match.second) for result in results)
    assert rounds == 1
    assert all({orders[i, j], orders[j, i]} == {2, 3} for i in range(4) for j in range(i))
    assert schedule.standing(results).scores == pytest.approx((0.0, 1 / 3, 2 / 3, 1.0))


def test_pivot_asks_about_the_first_candidate_only() -> None:
    schedule = _schedule("pivot", 4, samples=1)
    results, _ = _play(schedule, _later_is_better)
    assert {frozenset((result.match.first, result.match.second)) for result in results} == {
        frozenset((0, rival)) for rival in (1, 2, 3)
    }
    assert schedule.standing(results).scores == pytest.approx((0.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "num_candidates", "graded", "expected"),
    [
        ("all_pairs", 18, False, 765),
        ("all_pairs", 18, True, 765),
        ("pivot", 18, False, 85),
        ("tournament", 18, False, 153),
        ("tournament", 18, True, 76),
        ("tournament", 36, False, 306),
        ("tournament", 2, False, 5),
        ("tournament", 2, True, 2),
        ("tournament", 1, False, 0),
    ],
)
def test_what_a_chunk_may_cost(name: ScheduleName, num_candidates: int, graded: bool, expected: int) -> None:
    assert most_calls(name, num_candidates, graded=graded, budget=0, samples=5) == expected


def test_label_verdicts_of_all_pairs_come_in_both_orders() -> None:
    assert most_calls("all_pairs", 18, graded=True, budget=0, samples=1) == 306


def test_a_budget_of_ones_own_is_kept_and_graded_pairs_are_never_asked_about_again() -> None:
    assert most_calls("tournament", 18, graded=False, budget=500, samples=5) == 500
    assert most_calls("tournament", 4, graded=True, budget=500, samples=5) == 12


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    num_candidates=st.integers(1, 12),
    graded=st.booleans(),
    budget=st.integers(0, 40),
    samples=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
    values=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=7),
)
def test_every_schedule_ends_within_its_calls(
    name: ScheduleName,
    num_candidates: int,
    graded: bool,
    budget: int,
    samples: int,
    seed: int,
    values: list[float | None],
) -> None:
    schedule = _schedule(name, num_candidates, graded=graded, budget=budget, samples=samples, seed=seed)
    answers = iter(range(10**6))
    results, _ = _play(schedule, lambda match: values[next(answers) % len(values)])
    assert len(results) <= most_calls(name, num_candidates, graded=graded, budget=budget, samples=samples)
    assert all(0 <= r.match.first != r.match.second >= 0 for r in results)
    standing = schedule.standing(results)
    assert len(standing.scores) == len(standing.deviations) == num_candidates
    assert all(score is None or 0 <= score <= 1 for score in standing.scores)


@pytest.mark.parametrize("graded", [False, True])
def test_the_same_results_and_seed_bring_the_same_matches(graded: bool) -> None:
    results, _ = _play(_schedule(graded=graded, seed=4), _graded)
    again = _schedule(graded=graded, seed=4)
    played: list[Result] = []
    while matches := again.next_matches(played):
        assert matches == [result.match for result in results[len(played) : len(played) + len(matches)]]
        played = results[: len(played) + len(matches)]
    assert played == results
    assert _play(_schedule(graded=graded, seed=5), _graded)[0] != results


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_permuted_candidates_have_permuted_scores(name: ScheduleName, graded: bool) -> None:
    draw = np.random.default_rng(3)
    rows = [(*draw.permutation(6)[:2].tolist(), float(draw.random())) for _ in range(20)]
    place = [3, 0, 5, 1, 4, 2]
    schedule = _schedule(name, 6, graded=graded)
    scores = schedule.standing(_results(*rows)).scores
    moved = schedule.standing(_results(*[(place[first], place[second], value) for first, second, value in rows])).scores
    assert [moved[place[one]] for one in range(6)] == pytest.approx(list(scores))


@pytest.mark.parametrize("name", NAMES)
def test_candidates_without_a_readable_result_have_no_score(name: ScheduleName) -> None:
    standing = _schedule(name, 3).standing(_results((0, 1, 1.0), (1, 0, 0.0), (2, 1, None), (0, 2, None)))
    assert standing.scores[2] is None
    assert standing.deviations[2] is None
    assert standing.scores[0] is not None
    assert standing.scores[1] is not None
    assert standing.scores[0] > standing.scores[1]


@pytest.mark.parametrize("name", NAMES)
def test_one_candidate_ties_with_itself_without_a_call(name: ScheduleName) -> None:
    schedule = _schedule(name, 1)
    assert schedule.next_matches([]) == []
    assert schedule.standing([]) == Standing((0.5,), (0.0,), 1.0)


@pytest.mark.parametrize("num_candidates", [2, 3, 18, 145])
@pytest.mark.parametrize("graded", [False, True])
def test_a_clear_order_is_found_at_both_ends_in_few_rounds(num_candidates: int, graded: bool) -> None:
    schedule = _schedule(num_candidates=num_candidates, graded=graded, temper=Temper(sharpness=4.0))
    judge = _graded if graded else _later_is_better
    results, rounds = _play(schedule, judge)
    scores = schedule.standing(results).scores
    numbers = [-1.0 if score is None else score for score in scores]
    assert None not in scores
    assert rounds <= 8
    # Of 145 in a row, neighbours at the ends are all but equal.
    assert np.argmax(numbers) >= num_candidates - 1 - num_candidates // 20
    assert np.argmin(numbers) <= num_candidates // 20


def test_a_tournament_ends_early_when_both_ends_are_sure() -> None:
    schedule = _schedule(graded=True, temper=Temper(sharpness=5.0, whim=0.2))
    results, _ = _play(schedule, _graded)
    assert len(results) < 40
    assert schedule.standing(results).expected_share > SURE - 0.01


def test_graded_pairs_are_asked_about_once_in_an_order() -> None:
    results, _ = _play(_schedule(num_candidates=5, graded=True, temper=Temper(whim=5.0)), lambda match: 0.5)
    orders = [(result.match.first, result.match.second) for result in results]
    assert len(orders) == len(set(orders)) == 20


def test_later_rounds_play_for_the_ends() -> None:
    """Of 18 in a row the three at each end play more often than the twelve between them."""
    results, _ = _play(_schedule(temper=Temper(sharpness=3.0)), _later_is_better)
    games = Counter(place for result in results for place in (result.match.first, result.match.second))
    ends = [games[place] for place in (0, 1, 2, 15, 16, 17)]
    middle = [games[place] for place in range(3, 15)]
    assert np.mean(ends) > 2 * np.mean(middle)


def test_everyone_is_shown_first_about_as_often_as_second() -> None:
    results, _ = _play(_schedule(), _later_is_better)
    lead = Counter(result.match.first for result in results)
    lead.subtract(result.match.second for result in results)
    assert max(map(abs, lead.values())) <= 3


def test_a_larger_budget_is_expected_to_choose_better() -> None:
    few, many = (
        expected_share("tournament", 6, graded=False, budget=budget, samples=5, temper=Temper(sharpness=1.0))
        for budget in (6, 60)
    )
    assert 0.3 < few < many - 0.05 < 0.95
    assert expected_share("pivot", 1, graded=False, budget=0, samples=5, temper=Temper()) == 1.0
