"""How old weights are, in optimizer steps."""

import pytest

from trainer.publisher import PublishedSteps

RESUMED = PublishedSteps({0: 0, 1: 2, 2: 4, 3: 6, 4: 2, 5: 4})
"""Pushed every second step up to 6, then resumed from step 2 under a new number."""


@pytest.mark.parametrize(("step", "lag"), [(3, 0), (4, 1), (11, 8)])
def test_weights_after_step_2_have_no_lag_in_update_3(step: int, lag: int) -> None:
    assert RESUMED.lag([1], step=step) == lag


def test_the_oldest_weights_count_not_the_lowest_version() -> None:
    assert RESUMED.lag([3, 4], step=9) == 8 - 2


def test_weights_of_a_later_step_than_the_resumed_one_have_no_lag() -> None:
    assert RESUMED.lag([3], step=3) == 0


def test_a_version_that_is_not_known_counts_as_the_nearest_lower_one() -> None:
    known = PublishedSteps({3: 30, 5: 50})
    assert [known.step_of(version) for version in (2, 3, 4, 5, 6)] == [0, 30, 30, 50, 50]


def test_the_newest_version_is_at_least_0() -> None:
    assert PublishedSteps({}).newest_version == 0
    assert PublishedSteps({0: 0, 4: 2}).newest_version == 4
    assert PublishedSteps({}).lag([0], step=3) == 2
