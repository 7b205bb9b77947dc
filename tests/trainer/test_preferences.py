from collections import Counter
from random import Random

import pytest

from shared.records import Candidate, DroppedChunk, ScoredChunk, ScoredWindow
from tests.trainer.windows import candidate, chunk, window
from trainer.figures import Tally, window_figures
from trainer.inbox import TakenWindow
from trainer.preferences import Selection, rewards_by_kind, select_pairs

ORIGINAL, REWRITE = candidate("original", 1, 2), candidate("rewrite", 3, 4)
ROLLOUTS = [candidate("rollout", 5, i, version=3 + i) for i in range(3)]
POOL = [ORIGINAL, REWRITE, *ROLLOUTS]


def select(chunks: list[ScoredChunk], objective: str = "dpo", *, gap: float = 0.0, seed: int = 0) -> Selection:
    return select_pairs(window(0, chunks), objective, min_reward_gap=gap, seed=seed)


def tied(position: int) -> ScoredWindow:
    """The original and three rollouts share the highest reward; the rewrite is the lowest."""
    return window(position, [chunk(2, POOL, (0.9, 0.1, 0.9, 0.9, 0.9))])


def drawn(position: int, seed: int) -> Candidate:
    return select_pairs(tied(position), "dpo", min_reward_gap=0.0, seed=seed).pairs[0].chosen


def test_dpo_takes_the_highest_and_the_lowest_of_the_whole_pool() -> None:
    pair = select([chunk(5, POOL, (0.2, 0.5, 0.1, 0.9, 0.4))]).pairs[0]
    assert (pair.chosen, pair.rejected) == (ROLLOUTS[1], ROLLOUTS[0])
    assert pair.trunk[: pair.start] == (1, 2, 3, 4, 5)


def test_ties_are_broken_evenly_over_windows() -> None:
    kinds = Counter(drawn(position, 0).kinds[0] for position in range(400))
    assert 240 < kinds["rollout"] < 360  # three of four tied candidates are rollouts: 300 expected
    assert kinds["rewrite"] == 0


def test_the_draw_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    """And never changes between processes or releases."""
    assert [drawn(position, 1) for position in range(50)] != [drawn(position, 2) for position in range(50)]
    found = [POOL.index(drawn(position, 0)) for position in range(20)]
    assert found == [0, 3, 2, 4, 4, 3, 3, 4, 4, 3, 2, 0, 3, 0, 3, 4, 2, 3, 0, 4]


def test_rewards_within_the_gap_are_no_preference() -> None:
    close = chunk(2, POOL[:2], (0.50, 0.75))
    assert select([close], gap=0.25) == Selection((), no_preference=1, missing=0)
    assert len(select([close], gap=0.2).pairs) == 1


def test_a_chunk_whose_candidates_were_all_equal_is_no_preference() -> None:
    equal = DroppedChunk(start=4, reason="no_preference")
    unread = DroppedChunk(start=6, reason="unreadable_verdict")
    found = window(0, [chunk(2, POOL[:2], (1.0, 0.0))]).model_copy(update={"dropped_chunks": (equal, unread)})
    selection = select_pairs(found, "dpo", min_reward_gap=0.0, seed=0)
    assert (len(selection.pairs), selection.no_preference, selection.missing) == (1, 1, 0)


def test_a_tie_is_drawn_evenly_however_often_a_candidate_was_made() -> None:
    """The original, copied three times, ties with one rollout: 300 of 600 each, where copies would give 480 and 120."""
    copied = candidate(("original", "rewrite", "rollout", "rollout"), 1, 2)
    pool = [copied, ROLLOUTS[0], ROLLOUTS[1]]
    windows = [window(position, [chunk(2, pool, (0.9, 0.9, 0.1))]) for position in range(600)]
    chosen = [select_pairs(d, "dpo", min_reward_gap=0.0, seed=0).pairs[0].chosen for d in windows]
    assert 260 < chosen.count(ROLLOUTS[0]) < 340
    assert set(chosen) == {copied, ROLLOUTS[0]}


def test_a_chunk_without_judgement_or_with_one_candidate_is_missing_not_zero() -> None:
    assert select([chunk(2, POOL), chunk(4, POOL[:1], (1.0,))]).missing == 2
    assert select([chunk(2, POOL[:2], (None, 0.5))]).missing == 1


def test_rf_nll_takes_the_only_candidate_without_a_judge_and_dpo_takes_none() -> None:
    alone = [chunk(2, [ORIGINAL], None)]
    (pair,) = select(alone, "rf_nll").pairs
    assert (pair.chosen, pair.rejected) == (ORIGINAL, None)
    assert select(alone, "dpo").pairs == ()
    assert select([chunk(2, [ORIGINAL, REWRITE], None)], "rf_nll").pairs == ()


def test_rf_nll_takes_the_highest_even_if_all_tie() -> None:
    assert select([chunk(2, POOL, (0.1, 0.8, 0.3, 0.2, 0.1))], "rf_nll").pairs[0].chosen == REWRITE
    assert select([chunk(2, POOL, (0.5,) * 5)], "rf_nll").pairs[0].rejected is None


def test_sft_and_next_token_take_their_kind_without_a_judge() -> None:
    assert select([chunk(2, POOL)], "sft_rewrite").pairs[0].chosen == REWRITE
    assert select([chunk(2, POOL)], "sft_rollout").pairs[0].chosen in ROLLOUTS
    assert select([chunk(2, POOL)], "next_token").pairs[0].chosen == ORIGINAL


def test_a_missing_kind_gives_no_pair() -> None:
    assert select([chunk(2, [ORIGINAL])], "sft_rewrite") == Selection((), 0, missing=1)
    assert select([chunk(2, [ORIGINAL, REWRITE])], "dpo_rewrite_over_rollout").missing == 1


def test_rewrite_over_rollout_draws_its_rollout() -> None:
    windows = [window(position, [chunk(2, POOL)]) for position in range(60)]
    pairs = [select_pairs(d, "dpo_rewrite_over_rollout", min_reward_gap=0, seed=0).pairs[0] for d in windows]
    assert {pair.chosen for pair in pairs} == {REWRITE}
    assert {pair.rejected for pair in pairs} == set(ROLLOUTS)


def test_a_rollout_is_drawn_as_often_as_it_was_sampled() -> None:
    """Three of four samples are the one, so it is chosen in 450 of 600 windows, whichever kinds it has besides."""
    often = candidate(("original", "rollout", "rollout", "rollout"), 1, 2)
    pool = [often, ROLLOUTS[0]]
    windows = [window(position, [chunk(2, pool)]) for position in range(600)]
    chosen = [select_pairs(d, "sft_rollout", min_reward_gap=0.0, seed=0).pairs[0].chosen for d in windows]
    assert 405 < chosen.count(often) < 495


def test_the_rewrite_is_never_rejected_against_itself() -> None:
    """Of four samples two are the rewrite: the others are drawn 2 to 1 (one was sampled once, the original twice)."""
    rewrite = candidate(("rewrite", "rollout", "rollout"), 3, 4)
    original = candidate(("original", "rollout", "rollout"), 1, 2)
    windows = [window(position, [chunk(2, [original, rewrite, ROLLOUTS[0]])]) for position in range(600)]
    selections = [select_pairs(d, "dpo_rewrite_over_rollout", min_reward_gap=0.0, seed=0) for d in windows]
    rejected = [selection.pairs[0].rejected for selection in selections]
    assert set(rejected) == {original, ROLLOUTS[0]}
    assert 355 < rejected.count(original) < 445  # 2 of 3: 400
    only = select([chunk(2, [ORIGINAL, rewrite])], "dpo_rewrite_over_rollout")
    assert (only.pairs, only.no_preference, only.missing) == ((), 1, 0)


def test_a_chosen_candidate_counts_for_each_of_its_kinds_once() -> None:
    copied = candidate(("original", "rewrite", "rollout", "rollout"), 1, 2)
    chunks = [chunk(2, [copied, ROLLOUTS[0]], (1.0, 0.0)), chunk(4, [ORIGINAL, ROLLOUTS[0]], (0.0, 1.0))]
    figures = window_figures([TakenWindow("0.0.0.0", "1-0", select(chunks).pairs, lag=3)])
    rates = [figures[f"chosen_{kind}_rate"] for kind in ("original", "rewrite", "rollout")]
    assert rates == [0.5, 0.5, 1.0]


def test_the_lag_of_a_step_is_the_mean_over_its_pairs() -> None:
    pairs = select([chunk(start, [ORIGINAL, ROLLOUTS[0]], (0.0, 1.0)) for start in (2, 4, 6)]).pairs
    taken = [TakenWindow("a", "1-0", pairs, lag=1), TakenWindow("b", "2-0", pairs[:1], lag=5)]
    figures = window_figures([*taken, TakenWindow("c", "3-0", pairs, lag=None)])
    assert (figures["pairs"], figures["policy_lag_mean"], figures["policy_lag_max"]) == (7, 2.0, 5)


def test_rewards_by_kind_sum_over_the_pool_and_count_each_copy() -> None:
    copied = candidate(("original", "rewrite", "rollout", "rollout"), 1, 2)
    rewards = rewards_by_kind(window(0, [chunk(2, [copied, ROLLOUTS[0]], (0.75, 0.25)), chunk(4, POOL)]))
    assert rewards == {"original": (0.75, 1), "rewrite": (0.75, 1), "rollout": (1.75, 3)}
    rewards = rewards_by_kind(window(0, [chunk(2, POOL, (0.5, 0.25, 0.0, 1.0, 0.5)), chunk(4, POOL)]))
    assert rewards == {"original": (0.5, 1), "rewrite": (0.25, 1), "rollout": (1.5, 3)}


def test_an_unscored_candidate_is_neither_chosen_nor_rejected() -> None:
    """The rewrite would be the best or the worst of the three; two scored ones make a pair, one makes none."""
    pair = select([chunk(2, POOL[:3], (0.4, None, 0.6))]).pairs[0]
    assert (pair.chosen, pair.rejected) == (ROLLOUTS[0], ORIGINAL)
    assert select([chunk(2, POOL[:3], (0.4, None, None))]) == Selection((), no_preference=0, missing=1)
    assert select([chunk(2, POOL[:3], (0.4, None, None))], "rf_nll").pairs[0].chosen == ORIGINAL
    assert select([chunk(2, POOL[:3], (None, None, None))], "rf_nll") == Selection((), no_preference=0, missing=1)


def test_a_barred_candidate_may_be_rejected_and_is_never_chosen() -> None:
    pair = select([chunk(2, POOL[:3], (0.5, 0.9, 0.1), barred=(1, 2))]).pairs[0]
    assert (pair.chosen, pair.rejected) == (ORIGINAL, ROLLOUTS[0])
    assert select([chunk(2, POOL[:3], (0.5, 0.9, 0.1), barred=(1,))], "rf_nll").pairs[0].chosen == ORIGINAL
    best_is_barred = chunk(2, POOL[:2], (0.5, 0.9), barred=(1,))
    assert select([best_is_barred]) == Selection((), no_preference=1, missing=0)


@pytest.mark.parametrize("objective", ["dpo", "rf_nll"])
def test_a_chunk_whose_candidates_are_all_barred_has_a_count_of_its_own(objective: str) -> None:
    chunks = [chunk(2, POOL[:2], (0.5, 0.9), barred=(0, 1)), chunk(4, POOL[:3], (None, 0.9, 0.2), barred=(1, 2))]
    assert select(chunks, objective) == Selection((), no_preference=0, missing=0, barred=2)


def test_a_lone_candidate_that_was_judged_and_barred_is_not_chosen() -> None:
    assert select([chunk(2, [ORIGINAL], (0.5,))], "rf_nll").pairs[0].chosen == ORIGINAL
    assert select([chunk(2, [ORIGINAL], (0.5,), barred=(0,))], "rf_nll").barred == 1


def possible_pairs(rewards: list[float | None], barred: set[int]) -> set[tuple[int, int]] | str:
    """DPO's rule, tried on every ordered pair: a pair may be drawn if no other chosen or rejected would widen it."""
    scored = [place for place, reward in enumerate(rewards) if reward is not None]
    if len(scored) < 2:
        return "missing"
    if not set(scored) - barred:
        return "barred"
    gaps = {
        (chosen, rejected): (rewards[chosen] or 0.0) - (rewards[rejected] or 0.0)
        for chosen in scored
        if chosen not in barred
        for rejected in scored
    }
    widest = max(gaps.values())
    return {pair for pair, gap in gaps.items() if gap == widest} if widest > 0 else "no_preference"


def test_dpo_agrees_with_trying_every_pair() -> None:
    """Rewards from a few values, so that ties are frequent; eighths, so that their differences are exact."""
    random = Random(7)
    outcomes: Counter[str] = Counter()
    for number in range(600):
        rewards = [random.choice([None, 0.125, 0.25, 0.5, 0.875]) for _ in range(random.randint(1, 5))]
        barred = {place for place in range(len(rewards)) if random.random() < 0.4}
        expected = possible_pairs(rewards, barred)
        found = select([chunk(2, POOL[: len(rewards)], rewards, barred=sorted(barred))], seed=number)
        if isinstance(expected, str):
            assert (found.pairs, getattr(found, expected)) == ((), 1), (rewards, barred)
            outcomes[expected] += 1
        else:
            (pair,) = found.pairs
            assert pair.rejected is not None
            assert (POOL.index(pair.chosen), POOL.index(pair.rejected)) in expected, (rewards, barred)
            outcomes["pair"] += 1
    assert all(outcomes[name] > 30 for name in ("pair", "missing", "barred", "no_preference"))


def test_figures_count_what_could_not_be_scored_or_chosen() -> None:
    """Of five judged candidates two are barred and one is unscored; a chunk without a judgement has none."""
    judged = [chunk(2, POOL[:3], (0.5, None, 0.2), barred=(2,)), chunk(4, POOL[:2], (0.5, 0.2), barred=(0,))]
    tally = Tally()
    tally.add_window(window(0, [*judged, chunk(6, POOL)]), Selection((), no_preference=0, missing=1, barred=3))
    figures = tally.drain()
    assert (figures["barred_rate"], figures["unscored_candidates"], figures["barred_chunks"]) == (0.4, 1, 3)
    assert "barred_rate" not in tally.drain()
