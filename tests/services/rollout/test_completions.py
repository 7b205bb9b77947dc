"""/v1/completions and /v1/models with the official client."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM

from tests.services.rollout.conftest import TOKEN

PROMPT = [52, 258, 297, 263]
"""The tokens of "The moon"."""


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0, timeout=30) as client:
        yield client


def test_one_text_gives_one_choice_with_usage(client: OpenAI) -> None:
    answer = client.completions.create(model="policy", prompt="The moon", max_tokens=6, seed=1)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 6, 10)


def test_token_ids_and_text_are_the_same_prompt(client: OpenAI) -> None:
    by_text = client.completions.create(model="policy", prompt="The moon", max_tokens=6, seed=1)
    by_ids = client.completions.create(model="policy", prompt=PROMPT, max_tokens=6, seed=1)
    assert by_text.choices[0].text == by_ids.choices[0].text


def test_several_prompts_and_samples_are_indexed_in_order(client: OpenAI) -> None:
    answer = client.completions.create(
        model="policy", prompt=[PROMPT, [9, 10]], n=2, max_tokens=1, echo=True, temperature=0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text.startswith("The moon") for choice in answer.choices] == [True, True, False, False]


def test_a_stop_string_cuts_the_text(client: OpenAI) -> None:
    whole = client.completions.create(model="policy", prompt="The moon", max_tokens=20, seed=2).choices[0].text
    stop = whole[5:7]
    cut = client.completions.create(model="policy", prompt="The moon", max_tokens=20, seed=2, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_echoed_logprobs_are_the_models_own(client: OpenAI, tiny_model: Path) -> None:
    """The request that evaluation harnesses make for a log-likelihood."""
    answer = client.completions.create(
        model="policy", prompt=[PROMPT], max_tokens=1, temperature=0, echo=True, logprobs=1, seed=1234
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    module = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(False)
    log_probs = torch.log_softmax(module(torch.tensor([PROMPT])).logits[0], -1)
    given: list[float | None] = list(found.token_logprobs)
    expected = [float(log_probs[i, token]) for i, token in enumerate(PROMPT[1:])]
    assert given[0] is None
    assert given[1:-1] == pytest.approx(expected, abs=1e-4)
    assert max(found.top_logprobs[1].values()) == pytest.approx(float(log_probs[0].max()), abs=1e-4)
    assert given[-1] == max(found.top_logprobs[-1].values())
    assert (found.tokens or [])[:4] == ["T", "he", " mo", "on"]
    assert found.text_offset == [0, 1, 3, 6, 8]


def test_max_tokens_zero_scores_the_prompt_only(client: OpenAI) -> None:
    answer = client.completions.create(model="policy", prompt="The moon", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == "The moon"
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or []) == 4


def test_logprobs_without_echo_are_of_the_answer(client: OpenAI) -> None:
    answer = client.completions.create(model="policy", prompt="The moon", max_tokens=3, temperature=0, logprobs=1)
    found = answer.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == answer.choices[0].text
    assert [max(top.values()) for top in found.top_logprobs or []] == found.token_logprobs


def test_streaming_is_refused_clearly(client: OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="stream"):
        client.completions.create(model="policy", prompt="The moon", stream=True)


def test_another_model_is_not_here(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'policy'"):
        client.completions.create(model="gpt", prompt="The moon")


def test_a_wrong_key_is_an_authentication_error(url: str) -> None:
    with (
        OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_the_policy_is_the_one_model(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "policy"
    assert client.models.retrieve("policy").to_dict()["metadata"]["weight_version"] == 0  # type: ignore[index]
