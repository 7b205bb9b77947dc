"""How prompts share forward passes, and rows share batches."""

import pytest

from services.engine.hf.prefill import Branch, pack, plan_branches


def test_prompts_that_begin_another_share_its_branch() -> None:
    assert plan_branches([(1, 2), (7,), (1, 2, 3), (1,), (1, 2)]) == [
        [Branch((1, 2, 3), ((1, 2, 3), (1, 2), (1,))), Branch((7,), ((7,),))]
    ]
    assert plan_branches([]) == []


def test_a_short_shared_beginning_hangs_on_one_of_two_branches() -> None:
    (level,) = plan_branches([(1,), (1, 2), (1, 3)])
    assert sorted(branch.token_ids for branch in level) == [(1, 2), (1, 3)]
    assert sorted(prompt for branch in level for prompt in branch.prompts) == [(1,), (1, 2), (1, 3)]


def test_a_long_shared_beginning_is_run_once_and_continued() -> None:
    document, a, b = (1,) * 64, (2,) * 64, (3,) * 64
    prompts = [(*document, *first, last) for first in (a, b) for last in (4, 5)]
    beginning = document[:10]
    roots, stems, ends = plan_branches([*prompts, beginning])
    assert roots == [Branch(document, (beginning,))]
    assert stems == [Branch((*document, *first), (), document) for first in (a, b)]
    assert sorted(branch.token_ids for branch in ends) == sorted(prompts)
    assert all(branch.stem == branch.token_ids[:-1] and branch.prompts == (branch.token_ids,) for branch in ends)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "max_rows", "runs"),
    [
        ([5, 5, 2], 10, None, [range(0, 2), range(2, 3)]),
        ([50, 2, 2], 10, None, [range(0, 1), range(1, 3)]),
        ([2, 2, 2], 10, 2, [range(0, 2), range(2, 3)]),
        ([], 10, None, []),
    ],
)
def test_rows_are_packed_within_the_bounds(
    lengths: list[int], max_tokens: int, max_rows: int | None, runs: list[range]
) -> None:
    assert pack(lengths, max_tokens=max_tokens, max_rows=max_rows) == runs
