from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.layouts.windows import CPU, pair, some_pairs
from trainer.layouts.base import Layout, PassPlan, WindowPairs
from trainer.layouts.merged import Merged
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout

LAYOUTS = [SeparateLayout(), TreeLayout(Merged())]


def names(plans: list[PassPlan]) -> Counter[tuple[str, int]]:
    return Counter((one.window_id, one.start) for plan in plans if plan.counted for one in plan.pairs)


def num_tokens(layout: Layout, plan: PassPlan) -> int:
    return layout.lay_out(plan, device=CPU).num_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@given(sizes=st.lists(st.integers(1, 6), max_size=7), max_tokens=st.integers(1, 200), num_ranks=st.integers(1, 4))
def test_every_pair_counts_once_and_ranks_have_equally_many_passes_within_the_budget(
    layout: Layout, sizes: list[int], max_tokens: int, num_ranks: int
) -> None:
    windows = [some_pairs(number, num_chunks=size) for number, size in enumerate(sizes)]
    ranks = layout.plan(windows, max_tokens=max_tokens, num_ranks=num_ranks)
    assert len(ranks) == num_ranks
    assert len({len(plans) for plans in ranks}) == 1
    every = [plan for plans in ranks for plan in plans]
    assert names(every) == Counter((one.window_id, one.start) for window in windows for one in window)
    assert all(num_tokens(layout, plan) <= max_tokens or len(plan.pairs) == 1 for plan in every)
    assert ranks == layout.plan(windows, max_tokens=max_tokens, num_ranks=num_ranks)


def equal_windows(number: int) -> list[WindowPairs]:
    """A tree of 8 tokens each, and two separate sequences of 6."""
    return [(pair((1, 2, 3, 4), 4, (5, 5), (6, 6), window=str(index)),) for index in range(number)]


@pytest.mark.parametrize(("layout", "tokens"), [(LAYOUTS[0], 12), (LAYOUTS[1], 8)])
def test_ranks_get_equal_shares(layout: Layout, tokens: int) -> None:
    ranks = layout.plan(equal_windows(6), max_tokens=3 * tokens, num_ranks=2)
    assert [[num_tokens(layout, plan) for plan in plans] for plans in ranks] == [[3 * tokens], [3 * tokens]]
    ranks = layout.plan(equal_windows(6), max_tokens=6 * tokens, num_ranks=2)
    assert [[num_tokens(layout, plan) for plan in plans] for plans in ranks] == [[3 * tokens], [3 * tokens]]


def test_the_largest_go_out_in_turn_and_back_again() -> None:
    windows = [(pair((1,) * size, size, (2,), (3,), window=str(size)),) for size in (10, 20, 30, 40)]
    ranks = TreeLayout(Merged()).plan(windows, max_tokens=42, num_ranks=2)
    assert [[num_tokens(LAYOUTS[1], plan) for plan in plans] for plans in ranks] == [[42, 12], [32, 22]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_a_window_computes_a_copy_that_does_not_count(layout: Layout) -> None:
    ranks = layout.plan(equal_windows(1), max_tokens=100, num_ranks=3)
    assert [[plan.counted for plan in plans] for plans in ranks] == [[True], [False], [False]]
    assert ranks[0][0].windows == ranks[1][0].windows == ranks[2][0].windows


def test_a_window_over_the_budget_becomes_trees_of_neighbouring_pairs() -> None:
    trunk = tuple(range(1, 13))
    window = tuple(pair(trunk, start, (7,) * 4, (8,) * 4) for start in (2, 4, 6, 8))
    (plans,) = TreeLayout(Merged()).plan([window], max_tokens=22)
    assert [[one.start for one in plan.pairs] for plan in plans] == [[2, 4], [8], [6]]  # the largest first
    assert [num_tokens(LAYOUTS[1], plan) for plan in plans] == [20, 16, 14]
