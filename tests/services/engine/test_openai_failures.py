"""What an endpoint answers when something is wrong: the run waits for it, or one prompt is given up."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from services.engine.base import Sampling
from services.engine.openai import OpenAIEngine
from shared.errors import EngineError, HeadwaterError, PromptError, RequestError
from tests.services.engine.scripted_endpoint import Endpoint, serving, with_engine


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Endpoint, str]]:
    endpoint = Endpoint()
    with serving(endpoint) as url:
        yield endpoint, url


def error_of(served: tuple[Endpoint, str], **changes: Any) -> HeadwaterError:
    """What a request raises once the endpoint has changed so after the start."""
    endpoint, url = served
    vars(endpoint).update(vars(Endpoint()))

    async def work(engine: OpenAIEngine) -> HeadwaterError:
        vars(endpoint).update(changes)
        with pytest.raises(HeadwaterError) as caught:
            await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        return caught.value

    return with_engine(url, work)


def failing(status: int, message: str = "no", **error: str) -> dict[str, Any]:
    return {"num_failures": 99, "status": status, "error": {"message": message, **error}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (failing(404, "The model `m` does not exist."), "no such model or route .status 404.: check engine.model"),
        (failing(400, "Invalid model name passed in model=m"), "no such model or route .status 400."),
        (failing(400, "m was taken down", code="model_not_found"), "no such model or route .status 400."),
        (failing(401), "refused the key in the environment variable OPENAI_API_KEY"),
        (failing(403), "refused the key in the environment variable OPENAI_API_KEY"),
        (failing(402, "no credit is left"), "failed with status 402: .*no credit is left"),
        (failing(429), "failed with status 429"),
        (failing(500), "failed with status 500"),
        (failing(307) | {"headers": {"location": "https://me:hUsh@b.c/v1?key=hUsh"}}, "redirects to https://b.c/v1 "),
        (failing(302) | {"headers": {"location": "/login"}}, "redirects to /login .status 302.: name the final"),
        ({"raw": "<html>Log in</html>"}, "answered with '<html>Log in</html>', which has no choices"),
        ({"raw": '{"error": {"message": "upstream"}}'}, "answered with .*upstream"),
        ({"raw": '{"choices": []}'}, "has no choices"),
        ({"raw": ""}, "answered with nothing"),
        ({"raw": "9" * 100_000}, "answered with '9{300}...', which"),
        ({"finish_reason": "error"}, "broke off an answer"),
    ],
)
def test_what_nobody_foresaw_is_waited_for(served: tuple[Endpoint, str], change: dict[str, Any], said: str) -> None:
    error = error_of(served, **change)
    assert error.retryable
    assert isinstance(error, EngineError)
    assert re.search(said, str(error)), str(error)
    assert "hUsh" not in str(error)
    assert len(str(error)) < 700


@pytest.mark.parametrize(
    "change",
    [
        failing(400, "The response was filtered", code="content_filter"),
        failing(400, "Your request was rejected by Azure OpenAI's content management policy"),
        failing(400, "This model's maximum context length is 2048 tokens. However, you requested 9000"),
        failing(400, "The input (900 tokens) is longer than the model's context length"),
        failing(400, "x", code="context_length_exceeded"),
        failing(422, "prompt is too long: 9000 tokens > 2048 maximum"),
        failing(422, "") | {"error": "`inputs` tokens exceed the maximum input length of 2048"},
        failing(413, "Payload Too Large"),
        {"finish_reason": "content_filter"},
    ],
)
def test_what_one_prompt_causes_gives_up_that_prompt(served: tuple[Endpoint, str], change: dict[str, Any]) -> None:
    error = error_of(served, **change)
    assert isinstance(error, PromptError)
    assert not error.retryable


@pytest.mark.parametrize("status", [400, 422])
def test_any_other_refusal_is_about_the_request(served: tuple[Endpoint, str], status: int) -> None:
    error = error_of(served, **failing(status, "top_p must be positive"))
    assert isinstance(error, RequestError)
    assert "top_p must be positive" in str(error)
