"""The likelihood criterion: what is scored, and the sigmoid of it."""

import asyncio
import math

import pytest

from services.judge.likelihood import TokenReading, scores_within_group
from shared.api import JudgedText, JudgementItem, JudgementRequest
from shared.errors import TokenIdsNeededError
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import failed, judged, make_judge, make_window

LIKELIHOOD = {"likelihood": {"scale": 0.5}}
SHARED = TokenReading(shares_policy_tokens=True, beginning=None)
BOS = TokenReading(shares_policy_tokens=False, beginning=ord("^"))


def scoring(table: dict[str, list[float]]) -> FakeEngine:
    return FakeEngine(log_probs=lambda prompt, continuation: table[continuation])


def test_the_score_is_a_sigmoid_of_log_prob_per_token() -> None:
    """Means -1 and -3 (not the sums), group mean -2: sigmoid(1 / 0.5) = 0.8808."""
    engine = scoring({" long": [-1.0, -1.0, -1.0, -1.0], " x": [-3.0]})
    judgement = judged(engine, make_window(" long", " x"), criteria=LIKELIHOOD)
    assert judgement.rewards == pytest.approx((0.880797, 0.119203), abs=1e-6)
    assert (engine.num_score_calls, judgement.num_calls, engine.prompts) == (1, 1, ["The prefix"])


def with_tokens(*, prefix: str = "text") -> JudgementRequest:
    """The fake engine's tokens are bytes, so "ids" can be told from "text"."""
    candidates = (JudgedText(text=" t1", token_ids=tuple(b"id1")), JudgedText(text=" t2", token_ids=tuple(b"id2")))
    item = JudgementItem(start=len(prefix), end=len(prefix), candidates=candidates, token_start=3)
    return JudgementRequest(text=prefix, token_ids=tuple(b"ids and more"), items=(item,))


def test_shared_tokens_are_scored_as_they_were_sampled() -> None:
    engine = scoring({"id1": [-1.0], "id2": [-1.0]})
    judged(engine, with_tokens(), criteria=LIKELIHOOD, reading=SHARED)
    assert engine.prompts == ["ids"]


def test_token_ids_are_asked_for_where_they_are_scored() -> None:
    engine = scoring({"id1": [-1.0], "id2": [-1.0]})
    judge = make_judge(engine, criteria=LIKELIHOOD, reading=SHARED)
    with pytest.raises(TokenIdsNeededError, match="give `token_ids` of the window"):
        asyncio.run(judge.judge(make_window(" x", " y")))
    assert engine.prompts == []
    assert asyncio.run(judge.judge(with_tokens())).wants_token_ids
    texts = make_judge(scoring({" x": [-1.0], " y": [-1.0]}), criteria=LIKELIHOOD)
    assert not asyncio.run(texts.judge(make_window(" x", " y"))).wants_token_ids


def test_another_tokenizer_scores_the_texts_after_its_own_beginning() -> None:
    engine = scoring({" t1": [-1.0], " t2": [-1.0]})
    judged(engine, with_tokens(), criteria=LIKELIHOOD, reading=BOS)
    assert engine.prompts == ["^text"]


def test_an_empty_prefix_is_the_beginning_token_or_a_failure() -> None:
    engine = scoring({" t1": [-1.0], " t2": [-1.0]})
    window = with_tokens(prefix="")
    judged(engine, window, criteria=LIKELIHOOD, reading=BOS)
    assert engine.prompts == ["^"]
    assert failed(engine, window, criteria=LIKELIHOOD).reason == "empty_prefix"


def test_an_empty_candidate_is_unscored_where_texts_are_scored() -> None:
    """The others keep their scores and their mean, -2."""
    engine = scoring({" long": [-1.0, -1.0], " x": [-3.0]})
    judgement = judged(engine, make_window(" long", "", " x"), criteria=LIKELIHOOD)
    assert judgement.rewards == pytest.approx((0.880797, None, 0.119203), abs=1e-6)
    failure = failed(scoring({}), make_window("", ""), criteria=LIKELIHOOD)
    assert (failure.reason, failure.num_calls) == ("empty_candidate", 0)


def test_an_empty_rollout_is_scored_by_its_end_token_where_token_ids_are() -> None:
    """Log-probs -4 and -2, mean -3: sigmoid(-1 / 0.5) = 0.1192."""
    end = chr(2)
    candidates = (JudgedText(text="", token_ids=(2,)), JudgedText(text=" t", token_ids=tuple(b"id")))
    item = JudgementItem(start=4, end=4, candidates=candidates, token_start=3)
    window = JudgementRequest(text="text", token_ids=tuple(b"ids"), items=(item,))
    engine = scoring({end: [-4.0], "id": [-2.0, -2.0]})
    judgement = judged(engine, window, criteria=LIKELIHOOD, reading=SHARED)
    assert judgement.rewards == pytest.approx((0.119203, 0.880797), abs=1e-6)


@pytest.mark.parametrize("log_prob", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_costs_its_candidate_only(log_prob: float) -> None:
    engine = scoring({" x": [-1.0, log_prob], " y": [-1.0], " z": [-3.0]})
    judgement = judged(engine, make_window(" x", " y", " z"), criteria=LIKELIHOOD)
    assert judgement.rewards == pytest.approx((None, 0.880797, 0.119203), abs=1e-6)
    failure = failed(engine, make_window(" x", " x"), criteria=LIKELIHOOD)
    assert (failure.reason, failure.num_calls) == ("not_finite", 1)


def test_likelihoods_become_a_sigmoid_around_the_mean() -> None:
    """Mean -2; (-1 + 2) / 0.5 = 2: sigmoid(2) = 0.8808, sigmoid(-2) = 0.1192."""
    assert scores_within_group([-1.0, -2.0, -3.0], scale=0.5) == pytest.approx([0.880797, 0.5, 0.119203], abs=1e-6)


def test_extreme_likelihoods_do_not_overflow() -> None:
    assert scores_within_group([0.0, -1e6], scale=1.0) == pytest.approx([1.0, 0.0])
