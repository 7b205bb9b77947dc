import numpy as np
import pytest

from services.judge.posterior import BIAS_DEVIATION, Match, Result, Temper, fit, logits, sigmoid, tabulate
from services.judge.tempers import Tempers


def _results(*rows: tuple[int, int, float | None]) -> list[Result]:
    return [Result(Match(first, second), value) for first, second, value in rows]


THREE = _results((0, 1, 1.0), (1, 0, 1.0), (0, 1, 1.0), (1, 2, 1.0), (2, 0, 0.0), (2, 1, 0.5))


def _negative_log_posterior(point: np.ndarray, results: list[Result], temper: Temper) -> float:
    """Written out verdict by verdict, with a value v as v wins and 1 - v losses."""
    *utilities, bias = point
    total = sum(utility**2 for utility in utilities) / (2 * temper.sharpness**2)
    total += (bias - temper.bias) ** 2 / (2 * BIAS_DEVIATION**2)
    for result in results:
        if result.value is None:
            continue
        logit = utilities[result.match.first] - utilities[result.match.second] + bias
        total += result.value * np.log1p(np.exp(-logit)) + (1 - result.value) * np.log1p(np.exp(logit))
    return float(total)


def test_sampled_verdicts_bring_the_peak_of_a_bradley_terry_posterior() -> None:
    temper = Temper(sharpness=1.5, bias=0.2)
    found = fit(tabulate(THREE, 3, graded=False), temper, graded=False).mean
    peak, reach = np.zeros(4), 1.0
    while reach > 1e-4:  # by brute force: no neighbour in any direction is better
        steps = [peak + reach * sign * np.eye(4)[axis] for axis in range(4) for sign in (-1, 1)]
        best = min(steps, key=lambda point: _negative_log_posterior(point, THREE, temper))
        better = _negative_log_posterior(best, THREE, temper) < _negative_log_posterior(peak, THREE, temper)
        peak, reach = (best, reach) if better else (peak, reach / 2)
    assert found == pytest.approx(peak, abs=2e-3)


def test_the_covariance_is_the_inverse_curvature_at_the_peak() -> None:
    temper = Temper(sharpness=1.5, bias=0.2)
    found = fit(tabulate(THREE, 3, graded=False), temper, graded=False)
    step, curvature = 1e-3 * np.eye(4), np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            corners = [
                _negative_log_posterior(found.mean + a * step[i] + b * step[j], THREE, temper) * a * b
                for a in (-1, 1)
                for b in (-1, 1)
            ]
            curvature[i, j] = sum(corners) / 4e-6
    assert found.covariance == pytest.approx(np.linalg.inv(curvature), rel=5e-3, abs=1e-3)


def test_graded_verdicts_are_least_squares_with_a_prior() -> None:
    temper = Temper(sharpness=2.0, whim=0.5, bias=0.3)
    rows = [(0, 1, 0.9), (1, 2, 0.7), (2, 0, 0.2)]
    found = fit(tabulate(_results(*rows), 3, graded=True), temper, graded=True)
    # The prior as four more measurements, each row divided by its deviation.
    design = np.array([[1, -1, 0, 1], [0, 1, -1, 1], [-1, 0, 1, 1]]) / 0.5
    measured = np.log([0.9 / 0.1, 0.7 / 0.3, 0.2 / 0.8]) / 0.5
    design = np.vstack([design, np.diag([1 / 2.0, 1 / 2.0, 1 / 2.0, 1 / BIAS_DEVIATION])])
    measured = np.append(measured, [0, 0, 0, 0.3 / BIAS_DEVIATION])
    expected, *_ = np.linalg.lstsq(design, measured, rcond=None)
    assert found.mean == pytest.approx(expected)
    assert found.covariance == pytest.approx(np.linalg.inv(design.T @ design))


def test_verdicts_of_zero_and_one_have_bounded_logits() -> None:
    assert logits(np.array([0.0, 1e-300, 0.5, 1.0])) == pytest.approx([-12.0, -12.0, 0.0, 12.0])


@pytest.mark.parametrize("graded", [False, True])
def test_a_missing_result_is_no_evidence(graded: bool) -> None:
    missing = _results((0, 2, None), (1, 2, None))
    with_it = fit(tabulate([*THREE, *missing], 3, graded=graded), Temper(), graded=graded)
    without = fit(tabulate(THREE, 3, graded=graded), Temper(), graded=graded)
    assert np.array_equal(with_it.mean, without.mean)
    assert np.array_equal(with_it.covariance, without.covariance)


@pytest.mark.parametrize("graded", [False, True])
def test_without_evidence_the_posterior_is_the_prior(graded: bool) -> None:
    found = fit(tabulate([], 2, graded=graded), Temper(sharpness=3.0, bias=0.4), graded=graded)
    assert found.mean.tolist() == [0.0, 0.0, 0.4]
    assert found.covariance == pytest.approx(np.diag([9.0, 9.0, 0.25]))


def test_a_judge_that_always_says_first_is_biased_and_ranks_nobody() -> None:
    results = _results(*[(first, second, 1.0) for first in range(3) for second in range(3) if first != second])
    found = fit(tabulate(results, 3, graded=False), Temper(), graded=False)
    assert found.utilities == pytest.approx([0.0] * 3, abs=1e-9)
    assert found.bias > 0.4


def test_one_sided_verdicts_without_end_stay_finite() -> None:
    results = _results(*[(0, 1, 1.0)] * 500)
    found = fit(tabulate(results, 2, graded=False), Temper(sharpness=10.0), graded=False)
    assert np.isfinite(found.mean).all()
    assert np.isfinite(found.covariance).all()


def test_mean_wins_and_their_deviation_are_those_of_drawn_utilities() -> None:
    found = fit(tabulate(THREE * 20, 3, graded=False), Temper(), graded=False)
    scores, deviations = found.mean_wins()
    u = found.utilities
    by_hand = [(sigmoid(u[0] - u[1]) + sigmoid(u[0] - u[2])) / 2, (sigmoid(u[1] - u[0]) + sigmoid(u[1] - u[2])) / 2]
    assert scores[:2] == pytest.approx(by_hand)
    drawn = found.draw(np.random.default_rng(0), 20_000)
    wins = (sigmoid(drawn[:, 0] - drawn[:, 1]) + sigmoid(drawn[:, 0] - drawn[:, 2])) / 2
    assert deviations[0] == pytest.approx(wins.std(), rel=0.1)


@pytest.mark.parametrize(("graded", "sharpness"), [(True, 3.0), (True, 0.7), (False, 1.0)])
def test_the_temper_of_a_judge_is_learned(graded: bool, sharpness: float) -> None:
    draw = np.random.default_rng(0)
    tempers = Tempers(graded=graded)
    for _ in range(150):
        utilities = draw.normal(0.0, sharpness, 8)
        results = []
        for first, second in [(i, j) for i in range(8) for j in range(8) if i != j]:
            chance = sigmoid(utilities[first] - utilities[second] + 0.6 + graded * draw.normal(0.0, 0.5))
            results.append(Result(Match(first, second), float(chance if graded else draw.random() < chance)))
        tempers.learn(results, 8)
    assert tempers.temper.sharpness == pytest.approx(sharpness, rel=0.15)
    assert tempers.temper.bias == pytest.approx(0.6, abs=0.1)
    assert tempers.temper.whim == pytest.approx(0.5 if graded else 1.0, rel=0.15)


def test_chunks_that_say_nothing_teach_nothing() -> None:
    tempers = Tempers(graded=True)
    tempers.learn(_results((0, 1, None)), 2)
    tempers.learn([], 1)
    assert tempers.temper == Temper()
