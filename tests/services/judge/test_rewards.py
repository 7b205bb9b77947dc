"""The judge's arithmetic, by hand."""

import pytest

from services.judge.criteria import all_pairs, combined_rewards, scores_within_group, win_rates


def test_all_pairs_meet_once() -> None:
    assert all_pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_a_win_rate_is_the_mean_over_the_comparisons() -> None:
    """0 beats 1, ties with 2; 1 wins three quarters of its verdicts against 2."""
    rates = win_rates(3, {(0, 1): 1.0, (0, 2): 0.5, (1, 2): 0.75})
    assert rates == [0.75, 0.375, 0.375]


def test_likelihoods_become_a_sigmoid_around_the_mean() -> None:
    """Mean -2; (-1 + 2) / 0.5 = 2: sigmoid(2) = 0.8808, sigmoid(-2) = 0.1192."""
    assert scores_within_group([-1.0, -2.0, -3.0], scale=0.5) == pytest.approx([0.880797, 0.5, 0.119203], abs=1e-6)


def test_extreme_likelihoods_do_not_overflow() -> None:
    assert scores_within_group([0.0, -1e6], scale=1.0) == pytest.approx([1.0, 0.0])


def test_rewards_are_weighted_means() -> None:
    """(3 * 1 + 1 * 0.2) / 4 = 0.8, (3 * 0 + 1 * 1) / 4 = 0.25."""
    scores = {"quality": [1.0, 0.0], "safety": [0.2, 1.0]}
    assert combined_rewards(scores, {"quality": 3.0, "safety": 1.0}) == pytest.approx([0.8, 0.25])


def test_a_reward_never_exceeds_one() -> None:
    weights = {"quality": 0.1, "safety": 0.7, "factuality": 0.2}
    assert combined_rewards({name: [1.0] for name in weights}, weights)[0] <= 1.0
