"""The prompted criteria over the fake engine: what is asked, and what becomes of the verdicts."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from tests.services.fakes import FakeEngine
from tests.services.judge.judges import answering, judged, judgement_of, make_judge, make_window, prompt_file

ORDER = " best", " middle", " worst"


def prefers_better(prompt: str, _index: int) -> str:
    """Reads `A= best|B= worst`, as written by the test's prompt."""
    a, b = prompt.removeprefix("A=").split("|B=")
    return f"Because.\nVerdict: {'A' if ORDER.index(a) < ORDER.index(b) else 'B'}"


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, Any]:
    """Settings of a quality criterion that compares all pairs."""
    return {"prompt": prompt_file(tmp_path, "A={a}|B={b}"), "schedule": "all_pairs", "samples": 2}


def test_quality_is_the_mean_of_the_wins_over_all_pairs(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=prefers_better)
    judgement = judged(engine, make_window(" middle", " best", " worst"), criteria={"quality": pairs | {"samples": 4}})
    assert judgement.scores == {"quality": (0.5, 1.0, 0.0)}
    assert judgement.rewards == (0.5, 1.0, 0.0)
    assert (judgement.num_calls, judgement.num_failures) == (3 * 4, 0)
    assert judgement.reasoning.startswith("Because.")


def test_half_of_the_verdicts_are_asked_in_each_order(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=prefers_better)
    judged(engine, make_window(" best", " worst"), criteria={"quality": pairs | {"samples": 4}})
    assert sorted(engine.prompts) == ["A= best|B= worst"] * 2 + ["A= worst|B= best"] * 2
    assert len({sampling.seed for sampling in engine.samplings}) == 4


@pytest.mark.parametrize("samples", [2, 5])
def test_a_judge_that_likes_the_first_place_makes_ties(pairs: dict[str, Any], samples: int) -> None:
    criteria = {"quality": pairs | {"samples": samples}}
    judgement = judged(answering("Verdict: A"), make_window(" x", " y", " z"), criteria=criteria)
    assert judgement.rewards == (0.5, 0.5, 0.5)


def test_a_single_sample_is_asked_in_one_order(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=prefers_better)
    judgement = judged(engine, make_window(" best", " worst"), criteria={"quality": pairs | {"samples": 1}})
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 0.0), 1)


def test_a_tie_is_half_a_win_for_both(pairs: dict[str, Any]) -> None:
    """First order: tie; second order: the second one, shown as A, wins. (0.5 + 0) / 2 = 0.25."""
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: tie" if prompt == "A= x|B= y" else "Verdict: A")
    assert judged(engine, make_window(" x", " y"), criteria={"quality": pairs}).rewards == (0.25, 0.75)


def test_equal_texts_tie_without_being_asked(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=prefers_better)
    judgement = judged(engine, make_window(" worst", " best", " worst"), criteria={"quality": pairs})
    assert (judgement.rewards, judgement.num_calls) == ((0.0, 1.0, 0.0), 2)
    same = judged(engine, make_window(" worst", " worst"), criteria={"quality": pairs})
    assert (same.rewards, same.num_calls) == ((0.5, 0.5), 0)


def test_label_scores_of_both_orders_are_averaged(pairs: dict[str, Any]) -> None:
    """P(A) = 0.8 when x is A, 0.4 when y is A: x gets (0.8 + 0.6) / 2 = 0.7."""
    table = {("A= x|B= y", " A"): 0.8, ("A= x|B= y", " B"): 0.2, ("A= y|B= x", " A"): 0.4, ("A= y|B= x", " B"): 0.6}
    engine = FakeEngine(log_probs=lambda prompt, label: [math.log(table[prompt, label])])
    judgement = judged(engine, make_window(" x", " y"), criteria={"quality": pairs | {"verdict": "labels"}})
    assert judgement.rewards == pytest.approx((0.7, 0.3))
    assert (judgement.num_calls, judgement.reasoning) == (2, "")


def test_safety_is_the_mean_of_the_samples(tmp_path: Path) -> None:
    """4 of 5 answers say safe of " calm", 1 of 5 of " rude"."""
    engine = FakeEngine(
        answer=lambda prompt, index: f"Verdict: {'safe' if index < (4 if prompt == ' calm' else 1) else 'unsafe'}"
    )
    criteria = {"safety": {"prompt": prompt_file(tmp_path, "{candidate}")}}
    judgement = judged(engine, make_window(" calm", " rude"), criteria=criteria)
    assert judgement.scores["safety"] == pytest.approx((0.8, 0.2))
    assert judgement.num_calls == 10


def test_pointwise_criteria_ask_about_equal_texts_once() -> None:
    judgement = judged(answering("Verdict: safe"), make_window(" x", " x", " x"), criteria={"safety": {"samples": 3}})
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 1.0, 1.0), 3)


def test_factuality_sees_prefix_reference_and_candidate(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "{prefix}|{reference}|{candidate}")
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: " + ("none", "possible", "definite")[index])
    window = make_window(" {prefix}", " b", prefix="P", reference=" {candidate}")
    judgement = judged(engine, window, criteria={"factuality": {"prompt": path, "samples": 3}})
    assert judgement.rewards == (0.5, 0.5)
    assert engine.prompts == ["P| {candidate}| {prefix}", "P| {candidate}| b"]


def test_labels_are_read_as_an_expectation(tmp_path: Path) -> None:
    """0.2 none, 0.4 possible, 0.2 definite: (0.2 + 0.5 * 0.4) / 0.8 = 0.5."""
    path = prompt_file(tmp_path, "{reference}{candidate}\nGrade:")
    shares = {" none": 0.2, " possible": 0.4, " definite": 0.2}
    engine = FakeEngine(log_probs=lambda prompt, label: [math.log(shares[label])])
    criteria = {"factuality": {"prompt": path, "verdict": "labels"}}
    judgement = judged(engine, make_window(" x", " y"), criteria=criteria)
    assert judgement.rewards == pytest.approx((0.5, 0.5))
    assert engine.prompts == [" ref x\nGrade:", " ref y\nGrade:"]
    assert judgement.num_calls == 2


@pytest.mark.parametrize(("chat", "expected"), [(None, "<user>Safe?\n x</user>"), (False, "Safe?\n x")])
def test_the_chat_template_is_used_if_there_is_one(tmp_path: Path, chat: bool | None, expected: str) -> None:
    engine = answering("Verdict: safe", chat=True)
    criteria = {"safety": {"prompt": prompt_file(tmp_path, "Safe?\n{candidate}")}}
    judged(engine, make_window(" x", " x"), criteria=criteria, chat=chat)
    assert engine.prompts == [expected]


def test_under_a_chat_template_the_last_line_opens_the_answer_that_labels_end(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "Safe?\n{candidate}\nVerdict:")
    engine = FakeEngine(log_probs=lambda prompt, label: [-1.0], chat=True)
    judged(engine, make_window(" x\ny:", " x\ny:"), criteria={"safety": {"prompt": path, "verdict": "labels"}})
    assert engine.prompts == ["<user>Safe?\n x\ny:\n</user>Verdict:"]


@pytest.mark.parametrize(("bound", "shown"), [(4, "6789"), (0, ""), (100, "0123456789")])
def test_the_end_of_a_long_prefix_is_shown(tmp_path: Path, bound: int, shown: str) -> None:
    engine = answering("Verdict: safe")
    criteria = {"safety": {"prompt": prompt_file(tmp_path, "<{prefix}>{candidate}")}}
    judged(engine, make_window(" x", " x", prefix="0123456789"), criteria=criteria, max_prefix_characters=bound)
    assert engine.prompts == [f"<{shown}> x"]


def test_comparisons_name_who_was_shown_first_and_what_was_said(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=prefers_better)
    judgement = judged(engine, make_window(" worst", " best", " worst"), criteria={"quality": pairs})
    found = {(one.criterion, one.first, one.second, one.value) for one in judgement.comparisons}
    assert found == {("quality", 0, 1, 0.0), ("quality", 1, 0, 1.0)}


def test_a_tournament_finds_both_ends_of_many_with_few_calls(tmp_path: Path) -> None:
    """A judge without noise: 24 candidates have 552 ordered pairs; the budget is 8.5 calls a candidate."""
    texts = [f" {place:02}" for place in range(24)]
    engine = FakeEngine(answer=lambda prompt, _: f"Verdict: {'A' if prompt[3:5] > prompt[9:11] else 'B'}")
    criteria = {"quality": {"prompt": prompt_file(tmp_path, "A={a}|B={b}")}}
    judgement = judged(engine, make_window(*reversed(texts)), criteria=criteria)
    rewards = [reward for reward in judgement.rewards if reward is not None]
    assert (rewards.index(max(rewards)), rewards.index(min(rewards))) == (0, 23)
    assert judgement.num_calls == len(judgement.comparisons) <= 8.5 * 24


def test_a_missing_verdict_is_no_score_and_no_mean_counts_it(pairs: dict[str, Any]) -> None:
    """x and y can't be told apart in writing; both are compared with z, and x beats it while y loses."""
    said = {" x": {" z": "A"}, " y": {" z": "B"}, " z": {" x": "B", " y": "A"}}

    def answer(prompt: str, _index: int) -> str:
        a, b = prompt.removeprefix("A=").split("|B=")
        return f"Verdict: {said[a].get(b, 'neither')}"

    judgement = judged(
        FakeEngine(answer=answer), make_window(" x", " y", " z"), criteria={"quality": pairs}, max_retries=1
    )
    assert judgement.rewards == (1.0, 0.0, 0.5)
    assert [one.value for one in judgement.comparisons if {one.first, one.second} == {0, 1}] == [None, None]
    assert (judgement.num_calls, judgement.num_failures) == (4 + 2 * 2, 4)


def test_a_candidate_that_no_verdict_can_be_read_of_is_left_out(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=lambda prompt, i: "?" if " odd" in prompt else prefers_better(prompt, i))
    judgement = judged(engine, make_window(" best", " odd", " worst"), criteria={"quality": pairs}, max_retries=0)
    assert judgement.rewards == (1.0, None, 0.0)


def test_a_candidate_alone_is_scored_by_pointwise_criteria_only(pairs: dict[str, Any]) -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    window = make_window(" x").model_copy(update={"criteria": ("safety",)})
    judgement = judged(engine, window, criteria={"quality": pairs, "safety": {"samples": 2}})
    assert (judgement.rewards, judgement.num_calls) == ((1.0,), 2)


def test_a_request_for_one_criterion_and_one_candidate_asks_what_the_whole_will_ask(tmp_path: Path) -> None:
    """The screening of originals costs nothing twice: the second request pays for the other candidate only."""
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"samples": 3, "prompt": prompt_file(tmp_path, "{candidate}")}})
    alone = make_window(" x").model_copy(update={"criteria": ("safety",)})
    first, second = (asyncio.run(judgement_of(judge, window)) for window in (alone, make_window(" y", " x")))
    assert (first.num_calls, second.num_calls) == (3, 3)
    assert engine.prompts == [" x", " y"]
