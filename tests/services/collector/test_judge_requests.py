"""Whether the policy's token ids travel to the judge is for the judge to say."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import orjson
import pytest

from services.collector.answers import RefusedRequestError
from services.collector.clients import build_services, http_client
from services.collector.pools import judgement_item
from services.collector.windows import Chunk, TextSpan, Window, WindowText
from services.judge.app import build_app
from shared.api import JudgementRequest
from shared.errors import SettingsError
from shared.records import Candidate, WindowKey
from shared.settings import Secrets, Settings
from tests.services.serving import running

WINDOW = Window(
    WindowKey(part=0, epoch=0, position=0, window=0), "d0", (1, 2, 3, 4, 5), (Chunk(2, 4), Chunk(4, 5)), read_at=0.0
)
TEXT = WindowText("ab cd e", (TextSpan(2, 5), TextSpan(5, 7)))
POOL = (
    Candidate(kinds=("original",), token_ids=(3, 4), text=" cd"),
    Candidate(kinds=("rollout",), token_ids=(9,), text=" x", weight_version=0),
)


def make_request(with_token_ids: bool) -> JudgementRequest:
    items = tuple(judgement_item(WINDOW, i, TEXT, POOL, with_token_ids=with_token_ids) for i in range(2))
    request = JudgementRequest.model_construct(text=TEXT.text, items=items)
    return request.model_copy(update={"token_ids": WINDOW.token_ids}) if with_token_ids else request


class Judge:
    """Behind a transport: wants token ids as `wanting` says, request by request."""

    def __init__(self, wanting: Sequence[bool]) -> None:
        self._wanting = iter(wanting)
        self.bodies: list[Any] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        body = orjson.loads(request.content)
        JudgementRequest.model_validate(body)
        self.bodies.append(body)
        wants = next(self._wanting)
        if wants and "token_ids" not in body:
            return httpx.Response(428, json={"error": {"type": "TokenIdsNeededError", "message": "give token_ids"}})
        judgement = {"rewards": [1.0, 0.0], "scores": {}, "num_calls": 1, "fingerprint": "f"}
        return httpx.Response(200, json={"judgements": [judgement] * 2, "wants_token_ids": wants})

    @property
    def had_ids(self) -> list[bool]:
        return ["token_ids" in body for body in self.bodies]


def ask(judge: Judge, *, num_windows: int) -> None:
    async def run() -> None:
        transport = httpx.MockTransport(judge.handle)
        async with http_client(Settings(), token="", transport=transport) as http:
            services = build_services(Settings(), http)
            for _ in range(num_windows):
                await services.judge.judge(make_request, document="d")

    asyncio.run(run())


def test_a_judge_of_texts_gets_the_window_once_and_no_ids() -> None:
    judge = Judge([False])
    ask(judge, num_windows=1)
    assert judge.bodies[0] == {
        "text": "ab cd e",
        "items": [
            {"start": 2, "end": 5, "candidates": [{"text": " cd"}, {"text": " x"}]},
            {"start": 5, "end": 7, "candidates": [{"text": " cd"}, {"text": " x"}]},
        ],
    }


def test_a_judge_of_tokens_refuses_once_and_gets_them_from_then_on() -> None:
    judge = Judge([True] * 4)
    ask(judge, num_windows=3)
    assert judge.had_ids == [False, True, True, True]
    candidates = [{"text": " cd", "token_ids": [3, 4]}, {"text": " x", "token_ids": [9]}]
    assert judge.bodies[1] == {
        "text": "ab cd e",
        "token_ids": [1, 2, 3, 4, 5],
        "items": [
            {"start": 2, "end": 5, "token_start": 2, "candidates": candidates},
            {"start": 5, "end": 7, "token_start": 4, "candidates": candidates},
        ],
    }


def test_a_judge_that_is_replaced_is_asked_as_it_wants() -> None:
    """Texts, then tokens (one refusal), then texts again (one request with ids too many), then tokens at once."""
    judge = Judge([False, True, True, False, False, True, True])
    ask(judge, num_windows=5)
    assert judge.had_ids == [False, False, True, True, False, False, True]


def test_a_judge_that_has_the_ids_and_asks_for_them_is_refused() -> None:
    class NeverContent(Judge):
        def handle(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(428, json={"error": {"type": "TokenIdsNeededError", "message": "give token_ids"}})

    with pytest.raises(RefusedRequestError, match=r"give token_ids \(they were there\)") as caught:
        ask(NeverContent([]), num_windows=1)
    assert caught.value.reason == "judge_refused"


def test_a_request_too_large_for_a_real_judge_stops_with_the_numbers() -> None:
    """The judge answers before it has read the body, and closes: that must not look like a judge that is away."""
    scorer = {"criteria": {"python": {"function": "tests.services.judge.scorers:by_length"}}}
    judge = Settings.model_validate({"judge": scorer | {"max_request_bytes": 1_000_000}})
    request = make_request(False).model_copy(update={"text": "x" * 20_000_000})

    async def run(url: str) -> None:
        collector = {"max_backoff_s": 0.01, "max_attempts": 2}
        settings = Settings.model_validate({"judge": scorer | {"url": url}, "collector": collector})
        async with http_client(settings, token="word") as http:
            await build_services(settings, http).judge.judge(lambda with_token_ids: request, document="d")

    words = (
        r"answered 413: the request has 20,?000,?\d+ bytes or more, at most 1,?000,?000 .* raise judge\.max_request_"
    )
    with running(build_app(judge, Secrets(token="word"))) as url, pytest.raises(SettingsError, match=words):
        asyncio.run(run(url))
