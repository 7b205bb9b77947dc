"""The quality criterion over the fake engine: what is asked, and what becomes of the verdicts."""

import asyncio
import math
from pathlib import Path

import pytest

from tests.services.fakes import FakeEngine
from tests.services.judge.making import judgement_of, make_judge, make_window, prompt_file

ORDER = " best", " middle", " worst"


def prefers_better(prompt: str, _index: int) -> str:
    """Reads `A= best B= worst` as written by the test's prompt."""
    a, b = prompt.removeprefix("A=").split("|B=")
    return f"Because.\nVerdict: {'A' if ORDER.index(a) < ORDER.index(b) else 'B'}"


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    return prompt_file(tmp_path, "A={a}|B={b}")


def test_scores_are_mean_wins_over_all_pairs(prompt: str) -> None:
    engine = FakeEngine(answer=prefers_better)
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": 4}})
    judgement = asyncio.run(judgement_of(judge, make_window(" middle", " best", " worst")))
    assert judgement.scores == {"quality": (0.5, 1.0, 0.0)}
    assert judgement.rewards == (0.5, 1.0, 0.0)
    assert (judgement.num_calls, judgement.num_failures) == (3 * 4, 0)
    assert judgement.reasoning.startswith("Because.")


def test_half_of_the_verdicts_are_asked_in_each_order(prompt: str) -> None:
    engine = FakeEngine(answer=prefers_better)
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": 4}})
    asyncio.run(judgement_of(judge, make_window(" best", " worst")))
    assert sorted(engine.prompts) == ["A= best|B= worst", "A= worst|B= best"]
    assert [sampling.num_samples for sampling in engine.samplings] == [2, 2]
    assert engine.samplings[0].seed != engine.samplings[1].seed


@pytest.mark.parametrize("samples", [2, 5])
def test_a_judge_that_likes_the_first_place_makes_ties(prompt: str, samples: int) -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: A")
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": samples}})
    assert asyncio.run(judgement_of(judge, make_window(" x", " y", " z"))).rewards == (0.5, 0.5, 0.5)


def test_a_single_sample_is_asked_in_one_order(prompt: str) -> None:
    engine = FakeEngine(answer=prefers_better)
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": 1}})
    judgement = asyncio.run(judgement_of(judge, make_window(" best", " worst")))
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 0.0), 1)


def test_a_tie_is_half_a_win_for_both(prompt: str) -> None:
    """First order: tie; second order: the second one shown as A wins. (0.5 + 0) / 2 = 0.25."""
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: tie" if prompt == "A= x|B= y" else "Verdict: A")
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": 2}})
    assert asyncio.run(judgement_of(judge, make_window(" x", " y"))).rewards == (0.25, 0.75)


def test_equal_texts_tie_without_being_asked(prompt: str) -> None:
    """best beats both copies of worst: (1 + 1) / 2; a copy loses once and ties once: (0 + 0.5) / 2."""
    engine = FakeEngine(answer=prefers_better)
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "samples": 2}})
    judgement = asyncio.run(judgement_of(judge, make_window(" worst", " best", " worst")))
    assert (judgement.rewards, judgement.num_calls) == ((0.25, 1.0, 0.25), 2)
    same = asyncio.run(judgement_of(judge, make_window(" worst", " worst")))
    assert (same.rewards, same.num_calls) == ((0.5, 0.5), 0)


def test_label_scores_of_both_orders_are_averaged(prompt: str) -> None:
    """P(A) = 0.8 when x is A, 0.4 when y is A: x gets (0.8 + 0.6) / 2 = 0.7."""
    table = {("A= x|B= y", " A"): 0.8, ("A= x|B= y", " B"): 0.2, ("A= y|B= x", " A"): 0.4, ("A= y|B= x", " B"): 0.6}
    engine = FakeEngine(log_probs=lambda prompt, label: [math.log(table[prompt, label])])
    judge = make_judge(engine, criteria={"quality": {"prompt": prompt, "verdict": "labels"}})
    judgement = asyncio.run(judgement_of(judge, make_window(" x", " y")))
    assert judgement.rewards == pytest.approx((0.7, 0.3))
    assert (judgement.num_calls, judgement.reasoning) == (2, "")
