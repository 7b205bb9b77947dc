"""What answers about known pairs add up to, by hand."""

import pytest

from cli.judge_figures import PairAnswer, Share, as_data, as_table, figures_of
from services.pair_questions import Showing

FIRST, SECOND = True, False


def shown(*verdicts: tuple[bool, float | None]) -> PairAnswer:
    return PairAnswer("facts", None, tuple(Showing(order, value) for order, value in verdicts))


def test_an_interval_is_wilsons() -> None:
    """Newcombe (1998), table II: 81 of 263 has 0.2553 to 0.3662; 0 of 20 has 0 to 0.1611."""
    assert Share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_pair_counts_once_and_both_orders_weigh_the_same() -> None:
    assert shown((FIRST, 1.0), (FIRST, 1.0), (FIRST, 1.0), (SECOND, 0.0)).value == 0.5
    assert shown((FIRST, 0.9), (SECOND, 0.2)).value == 1.0
    assert shown((FIRST, None), (SECOND, 0.2)).value == 0.0
    assert shown((FIRST, None), (SECOND, None)).value is None
    assert PairAnswer("facts", 1.0).value == 1.0


def test_a_judge_that_always_says_a_is_seen() -> None:
    figures = figures_of("quality", [shown((FIRST, 1.0), (SECOND, 0.0))] * 4, seconds=1.0)
    assert (figures.share_of_first, figures.consistency.mean, figures.ties.mean) == (1.0, 0.0, 1.0)
    assert figures.accuracy == Share(2.0, 4)


def test_a_good_judge_wins_as_often_from_either_place() -> None:
    answers = [
        shown((FIRST, 1.0), (SECOND, 1.0)),
        shown((FIRST, 0.8), (SECOND, 0.6)),
        shown((FIRST, 0.1), (SECOND, 0.4)),
    ]
    figures = figures_of("quality", answers, seconds=1.0)
    assert (figures.accuracy, figures.consistency) == (Share(2.0, 3), Share(3.0, 3))
    assert figures.share_of_first == 0.5


def test_kinds_of_spoiling_stand_apart() -> None:
    answers = [PairAnswer("facts", 0.0), PairAnswer("facts", 0.5), PairAnswer("garbled", 1.0)]
    figures = figures_of("safety", answers, seconds=1.0)
    assert figures.by_spoiling == {"facts": Share(0.5, 2), "garbled": Share(1.0, 1)}
    assert (figures.share_of_first, figures.consistency.number) == (None, 0)


def test_what_is_missing_is_counted_by_cause_and_never_a_score() -> None:
    answers = [
        PairAnswer("facts", None, causes=("refused",), num_calls=1, num_failures=1),
        PairAnswer("facts", None, num_calls=2),
        shown((FIRST, None), (SECOND, 1.0)),
    ]
    figures = figures_of("quality", answers, seconds=2.5)
    assert figures.unreadable == {"refused": 1, "unscored": 1, "no_verdict": 1}
    assert figures.accuracy == Share(1.0, 1)
    assert (figures.num_calls, figures.num_failures, figures.num_pairs) == (3, 1, 3)


def test_a_criterion_without_verdicts_has_no_figures() -> None:
    figures = figures_of("quality", [PairAnswer("facts", None, causes=("refused",))], seconds=1.0)
    assert as_data(figures)["accuracy"] == {"value": None, "number": 0}
    line = as_table([figures])[1].split()
    assert line == ["quality", "0", "-", "-", "-", "-", "-", "1", "0", "1.0"]
