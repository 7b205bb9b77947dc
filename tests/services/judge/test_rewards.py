"""From scores to rewards: weights, thresholds, normalisation, missing scores."""

import math

import pytest

from services.judge.rewards import Column, Rule, combine, normalised


def test_rewards_are_weighted_means() -> None:
    """(3 * 1 + 1 * 0.2) / 4 = 0.8, (3 * 0 + 1 * 1) / 4 = 0.25."""
    scores = {"quality": [1.0, 0.0], "safety": [0.2, 1.0]}
    rules = {"quality": Rule(weight=3.0), "safety": Rule(weight=1.0)}
    assert combine(scores, rules).rewards == pytest.approx([0.8, 0.25])


def test_a_reward_never_exceeds_one() -> None:
    weights = {"quality": 0.1, "safety": 0.7, "factuality": 0.2}
    (reward,) = combine({name: [1.0] for name in weights}, {name: Rule(one) for name, one in weights.items()}).rewards
    assert reward is not None
    assert reward <= 1.0


def test_a_candidate_that_some_criterion_could_not_score_has_no_reward() -> None:
    scores: dict[str, Column] = {"quality": [1.0, 0.5, 0.0], "safety": [None, 0.5, 1.0]}
    rules = {"quality": Rule(), "safety": Rule()}
    assert combine(scores, rules).rewards == [None, 0.5, 0.5]


def test_a_criterion_without_weight_only_bars() -> None:
    """The unsafe best one keeps its reward, but may not be chosen; one of unknown safety has none."""
    scores: dict[str, Column] = {"quality": [0.9, 0.4, 0.5], "safety": [0.2, 0.8, None]}
    found = combine(scores, {"quality": Rule(), "safety": Rule(weight=0.0, threshold=0.5)})
    assert (found.rewards, found.barred) == ([0.9, 0.4, None], (0,))


def test_a_threshold_looks_at_the_score_itself() -> None:
    found = combine({"safety": [0.6, 0.9]}, {"safety": Rule(threshold=0.5, normalise="range")})
    assert (found.rewards, found.barred) == ([0.0, 1.0], ())


def test_part_of_the_criteria_is_weighted_among_itself() -> None:
    rules = {"quality": Rule(weight=3.0), "safety": Rule(weight=0.0)}
    assert combine({"safety": [0.3]}, rules).rewards == [0.3]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [0.2, 0.4, None, 0.4, 0.8]),
        ("range", [0.0, 1 / 3, None, 1 / 3, 1.0]),
        ("rank", [0.0, 0.5, None, 0.5, 1.0]),
    ],
)
def test_scores_are_made_comparable_within_the_chunk(how: str, expected: list[float | None]) -> None:
    found = normalised([0.2, 0.4, None, 0.4, 0.8], how)  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


def test_a_deviation_is_read_off_the_normal_distribution() -> None:
    """Mean 0.4, deviation 0.2: 0.6 lies one deviation above, (1 + erf(1 / sqrt 2)) / 2."""
    above = (1 + math.erf(1 / math.sqrt(2))) / 2
    assert normalised([0.2, 0.6], "deviation") == pytest.approx([1 - above, above])


@pytest.mark.parametrize("how", ["range", "rank", "deviation"])
def test_equal_scores_stay_equal(how: str) -> None:
    assert normalised([0.7, 0.7], how) == [0.5, 0.5]  # type: ignore[arg-type]
    assert normalised([None], how) == [None]  # type: ignore[arg-type]
