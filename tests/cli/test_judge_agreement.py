"""Agreement of two judges, by hand."""

from collections.abc import Sequence

import pytest

from cli.judge_agreement import Opinion, Replay, agreement_of, rank_correlation
from cli.judge_figures import Share
from shared.recordings import RecordedCandidate, RecordedChunk


def replay(
    then: Sequence[float | None],
    now: Sequence[float | None],
    *,
    barred_then: Sequence[int] = (),
    barred_now: Sequence[int] = (),
    kinds: Sequence[str] = (),
) -> Replay:
    candidates = tuple(
        RecordedCandidate((kinds[place] if kinds else "rollout",), f" {place}", 1, reward, place in barred_then)
        for place, reward in enumerate(then)
    )
    chunk = RecordedChunk("0.0.0.0", 8, "prefix original", 6, 15, True, candidates, "old", 3, 0.5)
    return Replay(chunk, Opinion(tuple(now), frozenset(barred_now)), num_calls=2)


def test_the_same_judge_agrees_with_itself() -> None:
    found = agreement_of([replay([0.9, 0.5, 0.1], [0.9, 0.5, 0.1])])
    assert (found.chosen, found.rejected, found.orders) == (Share(1, 1), Share(1, 1), Share(3, 3))
    assert (found.flipped, found.correlation) == (Share(0, 1), 1.0)


def test_the_opposite_judge_flips_everything() -> None:
    one = replay([0.9, 0.5, 0.1], [0.1, 0.5, 0.9])
    found = agreement_of([one])
    assert (found.chosen, found.rejected, found.orders) == (Share(0, 1), Share(0, 1), Share(0, 3))
    assert (found.flipped, found.correlation) == (Share(1, 1), -1.0)
    assert one.flip is not None
    assert (one.flip.chosen.text, one.flip.rejected.text) == (" 0", " 2")
    assert one.flip.gap == pytest.approx(0.8)


def test_ties_agree_by_the_chance_of_the_draw() -> None:
    """Then one of 0 and 1 is chosen, now one of 1, 2 and 3: both draw 1 in one of six cases."""
    found = agreement_of([replay([0.8, 0.8, 0.2, 0.2], [0.1, 0.7, 0.7, 0.7])])
    assert found.chosen.mean == pytest.approx(1 / 6)
    assert found.orders == Share(0, 2), "0 and 2, 0 and 3 are ordered by both"
    assert found.flipped == Share(1, 1)


def test_a_barred_candidate_is_never_chosen_and_may_be_rejected() -> None:
    found = agreement_of([replay([0.9, 0.5, 0.1], [0.9, 0.5, 0.1], barred_now=[0])])
    assert (found.chosen, found.rejected) == (Share(0, 1), Share(1, 1))
    assert replay([0.9, 0.5], [0.1, 0.2], barred_then=[0, 1]).flip is None
    assert replay([0.9, 0.5, 0.1], [0.1, 0.2, 0.3], barred_then=[0]).then.pair == (1, 2)


def test_missing_rewards_are_left_out() -> None:
    found = agreement_of([replay([0.9, None, 0.1], [None, 0.5, 0.4])])
    assert found.orders.number == 0
    assert found.flipped == Share(0, 1)
    assert (found.chosen, found.correlation) == (Share(0, 1), None)
    nothing = agreement_of([replay([0.5, 0.5], [0.5, 0.5])])
    assert (nothing.flipped.number, nothing.correlation) == (0, None)


def test_a_failed_replay_counts_nowhere() -> None:
    failed = Replay(replay([0.9, 0.1], [0.9, 0.1]).chunk, None, reason="unreadable_verdict")
    found = agreement_of([failed])
    assert (found.chosen.number, found.orders.number, found.flipped.number) == (0, 0, 0)


def test_shares_of_chosen_kinds_stand_side_by_side() -> None:
    kinds = ["original", "rollout"]
    found = agreement_of([replay([0.9, 0.1], [0.5, 0.5], kinds=kinds), replay([0.2, 0.3], [0.2, 0.3], kinds=kinds)])
    assert found.chosen_kinds == {"original": (0.5, 0.25), "rewrite": (0.0, 0.0), "rollout": (0.5, 0.75)}


def test_rank_correlation_with_ties_is_spearmans() -> None:
    """Ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: covariance 4.5, spreads 4.5 and 5."""
    assert rank_correlation([0.1, 0.4, 0.4, 0.9], [0.2, 0.3, 0.5, 0.6]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([0.1, 0.4, None], [0.2, 0.3, 0.9]) == 1.0
