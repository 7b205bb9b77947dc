"""What an endpoint can do is found out at start, and asked for in the way it takes."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from services.engine.base import Sampling
from services.engine.openai import OpenAIEngine
from shared.errors import EngineError
from tests.services.engine.scripted_endpoint import Endpoint, serving, with_engine


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Endpoint, str]]:
    endpoint = Endpoint()
    with serving(endpoint) as url:
        yield endpoint, url


@pytest.fixture
def endpoint(served: tuple[Endpoint, str]) -> Endpoint:
    vars(served[0]).update(vars(Endpoint()))
    return served[0]


def asked_for(url: str, endpoint: Endpoint, sampling: Sampling, **settings: Any) -> list[dict[str, Any]]:
    """The requests that one prompt made."""

    async def work(engine: OpenAIEngine) -> None:
        endpoint.asked.clear()
        (answers,) = await engine.generate([engine.render_chat("So?")], sampling)
        assert len(answers) == sampling.num_samples

    with_engine(url, work, **settings)
    return endpoint.asked


THREE = Sampling(max_tokens=9, num_samples=3, temperature=0.5, seed=4)


def test_what_it_takes_is_asked_in_one_request(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    (asked,) = asked_for(served[1], endpoint, THREE)
    expected = {"n": 3, "max_tokens": 9, "temperature": 0.5, "top_p": 1.0, "seed": 4}
    assert expected.items() <= asked.items()
    assert "logprobs" not in asked


@pytest.mark.parametrize("refuses", [True, False])
def test_an_endpoint_without_n_is_asked_once_a_sample(
    served: tuple[Endpoint, str], endpoint: Endpoint, refuses: bool
) -> None:
    endpoint.ignores_n, endpoint.refused = not refuses, ("n",) if refuses else ()
    asked = asked_for(served[1], endpoint, THREE)
    assert len(asked) == 3
    assert len({one["seed"] for one in asked}) == 3
    assert not any("n" in one for one in asked)


def test_fewer_samples_than_the_probe_promised_are_an_error(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    async def work(engine: OpenAIEngine) -> None:
        endpoint.ignores_n = True
        endpoint.asked.clear()
        with pytest.raises(EngineError, match="gave 1 samples, 3 were asked for") as caught:
            await engine.generate([engine.render_chat("So?")], THREE)
        assert caught.value.retryable
        assert len(endpoint.asked) == 1

    with_engine(served[1], work)


def test_fields_that_it_refuses_are_left_out(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    endpoint.refused = ("max_tokens", "seed", "temperature")
    (asked,) = asked_for(served[1], endpoint, THREE)
    assert asked["max_completion_tokens"] == 9
    assert not {"max_tokens", "seed", "temperature", "top_p"} & asked.keys()


@pytest.mark.parametrize(
    ("most", "of_labels", "of_two_words", "of_three_words"), [(20, 20, 5, 7), (8, 5, 5, 5), (1, 1, 1, 1)]
)
def test_as_many_log_probs_are_asked_for_as_it_gives_and_words_need(
    served: tuple[Endpoint, str], endpoint: Endpoint, most: int, of_labels: int, of_two_words: int, of_three_words: int
) -> None:
    endpoint.most_top = most

    async def work(engine: OpenAIEngine) -> list[int]:
        assert engine.can_grade
        prompt = engine.render_chat("So?")
        await engine.score(prompt, [" yes"])
        for words in (("yes", "no"), ("yes", "no", "tie")):
            await engine.generate([prompt], Sampling(max_tokens=9, words=words))
        return [asked["top_logprobs"] for asked in endpoint.asked[-3:]]

    assert with_engine(served[1], work) == [of_labels, of_two_words, of_three_words]


def test_without_log_probs_none_are_asked_for(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    endpoint.most_top = 0

    async def work(engine: OpenAIEngine) -> bool:
        ((answer,),) = await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=9, words=("yes", "no")))
        assert answer.word_odds == ()
        return engine.can_grade

    assert not with_engine(served[1], work)
    assert "top_logprobs" not in endpoint.asked[-1]


def test_log_probs_in_another_form_are_an_error(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    async def work(engine: OpenAIEngine) -> None:
        listed = [{"token": " yes", "logprob": -0.5, "top_logprobs": [{"word": " yes"}]}]
        choice = {"message": {"content": "yes"}, "logprobs": {"content": listed}}
        endpoint.raw = json.dumps({"choices": [choice]})
        with pytest.raises(EngineError, match="lists log-probs in a form that is not OpenAI's"):
            await engine.score(engine.render_chat("So?"), [" yes"])

    with_engine(served[1], work)


def test_the_written_verdict_comes_with_the_odds_of_all(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    async def work(engine: OpenAIEngine) -> None:
        endpoint.answer, endpoint.tokens = "So: yes", ["So", ":", " yes", "<end>"]
        sampling = Sampling(max_tokens=9, words=("yes", "no"))
        ((answer,),) = await engine.generate([engine.render_chat("So?")], sampling)
        (odds,) = answer.word_odds
        assert odds.start == 4
        assert odds.log_probs == pytest.approx((-0.5, -1.5))

    with_engine(served[1], work)


def test_it_is_logged(served: tuple[Endpoint, str], caplog: pytest.LogCaptureFixture) -> None:
    async def nothing(engine: OpenAIEngine) -> None:
        assert engine.summary in caplog.text

    vars(served[0]).update(vars(Endpoint(ignores_n=True, refused=("max_tokens",))))
    with caplog.at_level(logging.INFO):
        with_engine(served[1], nothing)
    chat = "/chat/completions: no n, seed, temperature, 2 top log-probs; bound by max_completion_tokens"
    assert f"{chat}; /completions: does not work" in caplog.text


def test_without_a_chat_route_there_is_no_chat_template(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    endpoint.has_completions, endpoint.refused = True, ("messages",)

    async def work(engine: OpenAIEngine) -> None:
        assert not engine.has_chat_template
        assert engine.can_grade
        assert [[found.text for found in of_prompt] for of_prompt in await engine.generate(["So"], THREE)] == [
            ["answer 0", "answer 1", "answer 2"]
        ]
        with pytest.raises(EngineError, match="can't be asked at /chat/completions"):
            await engine.generate([engine.render_chat("So?")], THREE)

    with_engine(served[1], work)


def test_an_endpoint_that_ignores_echo_scores_by_the_next_token(
    served: tuple[Endpoint, str], endpoint: Endpoint
) -> None:
    endpoint.has_completions = True
    scores = with_engine(served[1], lambda engine: engine.score("So?", [" yes", " no", " maybe"]))
    assert scores == [[-0.5], [-1.5], [-9.0]], "as the least likely one that is listed"


def test_a_model_that_no_route_has_is_an_error_at_start(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    endpoint.refused = ("model",)
    with pytest.raises(EngineError, match=r"no route works: .*unknown field model"):
        with_engine(served[1], lambda engine: engine.generate(["So"], THREE))


def test_chat_options_of_reasoning_models_are_sent(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    """Their thoughts, which come beside the answer, are no part of it."""
    endpoint.message = {"reasoning_content": "Verdict: B", "reasoning": "Verdict: B"}
    endpoint.answer = "Verdict: A"

    async def work(engine: OpenAIEngine) -> str:
        ((answer,),) = await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        return answer.text

    settings: dict[str, Any] = {
        "system_prompt": "Be brief.",
        "chat_template_arguments": {"enable_thinking": False},
        "extra_body": {"reasoning_effort": "low"},
    }
    assert with_engine(served[1], work, **settings) == "Verdict: A"
    asked = endpoint.asked[-1]
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "So?"}]
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked["reasoning_effort"] == "low"


def test_an_answer_of_thoughts_alone_is_empty(served: tuple[Endpoint, str], endpoint: Endpoint) -> None:
    endpoint.message, endpoint.finish_reason = {"content": None, "reasoning_content": "Verdict: B"}, "length"

    async def work(engine: OpenAIEngine) -> tuple[str, str]:
        ((answer,),) = await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        return answer.text, answer.finish_reason

    assert with_engine(served[1], work) == ("", "length")
