"""The watch over known pairs: exact levels, a state that survives, and no way into training."""

import logging
from math import comb

import pytest

from shared.database import EventRow
from shared.records import Probe, ScoredWindow
from tests.trainer.conftest import MakeStack
from tests.trainer.windows import plain_window
from trainer.figures import FIGURES
from trainer.probe_watch import ALPHA, Block, FallTest, ProbeWatch, chance_of_fewer, probe_figures

WON, LOST, TIED = (Probe(kind="spoiled", spoiling="facts", value=value) for value in (1.0, 0.0, 0.5))


def test_figures_are_means_over_the_pairs_that_have_them() -> None:
    unreadable = Probe(kind="base", value=None, reason="unreadable_verdict")
    human = Probe(kind="base", value=0.0, consistent=False)
    seen = [WON.model_copy(update={"consistent": True}), WON, TIED, LOST, unreadable, human]
    figures = probe_figures(seen)
    assert figures == {
        "judge_probes_spoiled": 4,
        "judge_probe_accuracy": 2.5 / 4,
        "judge_probes_base": 1,
        "judge_probe_human_over_base": 0.0,
        "judge_probe_unreadable": 1 / 6,
        "judge_probe_consistency": 0.5,
    }
    assert probe_figures([]) == {}
    assert probe_figures([unreadable]) == {"judge_probe_unreadable": 1.0}


def test_the_p_value_is_fishers() -> None:
    """3 of 3 against 1 of 3: of the C(6, 3) = 20 ways to deal the 4 wins, C(4, 1) C(2, 2) = 4 give the later block one
    win, and none gives it fewer."""
    assert chance_of_fewer(Block(3, 3), Block(1, 3)) == pytest.approx(4 / 20)
    assert chance_of_fewer(Block(5, 5), Block(5, 5)) == 1.0
    only_way = 1 / comb(20, 10)
    assert chance_of_fewer(Block(10, 10), Block(0, 10)) == pytest.approx(only_way)
    assert chance_of_fewer(Block(9.5, 10), Block(0.5, 10)) == chance_of_fewer(Block(9, 10), Block(1, 10))


def test_later_blocks_need_stronger_evidence() -> None:
    """A p-value of 0.01: enough at level ALPHA / 2 of the first comparison, too weak at ALPHA / 12 of the third."""
    fallen = Block(12, 20)
    assert ALPHA / 6 < chance_of_fewer(Block(19, 20), fallen) < ALPHA / 2
    early, late = FallTest(size=20), FallTest(size=20)
    assert not early.add(19, 20)
    assert early.add(fallen.total, fallen.number)
    assert [late.add(19, 20) for _ in range(3)] == [False] * 3
    assert not late.add(fallen.total, fallen.number)
    assert late.num_compared == 3


def test_a_judge_that_does_not_change_is_never_reported() -> None:
    watch = ProbeWatch()
    for _ in range(300):
        watch.note(probe_figures([WON, WON, WON, LOST]))
    assert watch.take_falls() == []
    assert watch.note({})["judge_probes_fell"] == 0.0


def test_a_fall_is_told_once_and_stands_until_a_block_is_better() -> None:
    watch = ProbeWatch()
    for _ in range(25):
        assert watch.note(probe_figures([WON] * 4)) == {}
    for _ in range(25):
        now = watch.note(probe_figures([WON, WON, LOST, LOST]))
    assert now == {"judge_probe_accuracy_first": 1.0, "judge_probe_accuracy_last": 0.5, "judge_probes_fell": 1.0}
    (sentence,) = watch.take_falls()
    assert "50% of the last 100 known pairs, at the run's beginning in 100%" in sentence
    assert watch.take_falls() == []
    assert watch.note(probe_figures([WON] * 100))["judge_probes_fell"] == 0.0
    assert now.keys() <= FIGURES.keys()


def probed(position: int, run: str, *probes: Probe) -> ScoredWindow:
    return plain_window(position, run=run).model_copy(update={"probes": probes})


def test_probes_become_figures_and_never_pairs(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3)
    stack.write([probed(0, stack.run, WON, LOST, WON, WON), plain_window(1, run=stack.run)])
    stack.train()
    first, second = stack.figures()
    assert (first["pairs"], first["judge_probe_accuracy"], first["judge_probes_spoiled"]) == (3, 0.75, 4)
    assert not [name for name in second if name.startswith("judge_probe")]
    assert first.keys() <= FIGURES.keys()


def test_a_fall_is_an_event_and_its_beginning_survives_a_restart(
    make_stack: MakeStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack = make_stack(steps=2, pairs_per_step=3)
    stack = stack.with_settings("judge", probe_share=0.5)
    stack.write([probed(0, stack.run, *[WON] * 100), probed(1, stack.run, *[WON] * 50)])
    stack.train()
    later = stack.with_settings("trainer", steps=3)
    later.write([probed(2, stack.run, *[LOST] * 50)])
    with caplog.at_level(logging.WARNING, logger="trainer.figures"):
        later.train()
    (event,) = [row for row in later.rows(EventRow) if row.kind == "judge_probes_fell"]
    assert "in 50% of the last 100 known pairs, at the run's beginning in 100%" in event.message
    assert "the policy may have learned to please it" in caplog.text
    assert later.figures()[-1]["judge_probes_fell"] == 1.0
