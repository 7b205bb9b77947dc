"""What becomes of a request: seeds, failures of single chunks, and the combined reward."""

import asyncio

import pytest

from services.judge.judge import combined_rewards
from shared.api import JudgementRequest
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import answering, failed, judged, make_judge, make_window


def test_after_all_retries_the_chunk_is_a_failure_never_a_score() -> None:
    """One criterion gives no readable verdict: no partial mean over the other. 2 + 3 * 1 calls."""
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe" if "safe" in prompt else "I would rather not.")
    criteria = {"safety": {"samples": 2}, "factuality": {"samples": 1}}
    failure = failed(engine, make_window(" x", " x"), criteria=criteria, max_retries=2)
    assert (failure.reason, failure.num_calls, failure.num_failures) == ("unreadable_verdict", 5, 3)


def test_only_the_failing_chunk_fails() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "?" if " strange" in prompt else "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"samples": 1}}, max_retries=0)
    windows = [make_window(first, " y") for first in (" x", " strange", " z")]
    request = JudgementRequest(text=windows[0].text, items=tuple(window.items[0] for window in windows))
    response = asyncio.run(judge.judge(request))
    assert [hasattr(judgement, "reason") for judgement in response.judgements] == [False, True, False]


def test_the_same_request_asks_with_the_same_seeds() -> None:
    engine = answering("Verdict: safe")
    for seed in (1, 1, 2):
        window = make_window(" x", " y").model_copy(update={"seed": seed})
        judged(engine, window, criteria={"safety": {"samples": 1}})
    first, second, other = ([one.seed for one in engine.samplings[at : at + 2]] for at in (0, 2, 4))
    assert first == second
    assert not set(first) & set(other)


def test_rewards_are_weighted_means() -> None:
    """(3 * 1 + 1 * 0.2) / 4 = 0.8, (3 * 0 + 1 * 1) / 4 = 0.25."""
    scores = {"quality": [1.0, 0.0], "safety": [0.2, 1.0]}
    assert combined_rewards(scores, {"quality": 3.0, "safety": 1.0}) == pytest.approx([0.8, 0.25])


def test_a_reward_never_exceeds_one() -> None:
    weights = {"quality": 0.1, "safety": 0.7, "factuality": 0.2}
    (reward,) = combined_rewards({name: [1.0] for name in weights}, weights)
    assert reward is not None
    assert reward <= 1.0
