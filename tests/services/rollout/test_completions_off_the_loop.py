"""Answers of /v1/completions are built beside the event loop, which serves /v1/rollouts and the probes meanwhile.

Nothing here measures time: calls are counted, by the thread that makes them.
"""

import asyncio
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.app import create_app
from services.engine.base import Prompt, TokenScore, TokenSequence
from services.engine.life import EngineLife
from services.rollout.completions import build_router
from shared.api import Readiness
from shared.settings import Secrets
from tests.services.fakes import FakeEngine

ECHO = {"model": "policy", "max_tokens": 0, "echo": True, "logprobs": 1}
MANY = [list(b"the sea and the hill ") * 5] * 40
"""4,200 tokens in 40 prompts."""
SCORE = TokenScore(-1.0, ord("t"), -0.5)


@dataclass
class CountingEngine(FakeEngine):
    """Counts what is asked of its tokenizer by thread."""

    threads: list[int] = field(default_factory=list)
    """Of each call of encode or decode."""

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.get_ident())
        return super().encode(text)

    def decode(self, token_ids: TokenSequence) -> str:
        self.threads.append(threading.get_ident())
        return super().decode(token_ids)

    async def score_tokens(self, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[list[TokenScore]], int]:
        return [[SCORE] * len(tokens) for tokens in continuations], 7


@dataclass
class WaitingEngine(CountingEngine):
    """Decodes only after the event loop had a turn."""

    turn: threading.Event = field(default_factory=threading.Event)

    def decode(self, token_ids: TokenSequence) -> str:
        self.turn.clear()
        assert self.turn.wait(30), "the event loop had no turn while an answer was built"
        return super().decode(token_ids)


def app_on(engine: FakeEngine) -> FastAPI:
    life = EngineLife(engine, build=lambda: asyncio.sleep(0))
    life.ready = True
    app = create_app(
        service="rollout",
        title="rollout",
        description="",
        secrets=Secrets(),
        readiness=lambda: Readiness(ready=True, service="rollout"),
        max_request_bytes=64_000_000,
    )
    app.include_router(build_router(engine, life))
    return app


async def ask(app: FastAPI, **body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/completions", json=ECHO | body)


@pytest.mark.parametrize("prompt", [MANY, ["the sea and the hill", "a town"]])
def test_the_tokenizer_is_never_used_on_the_event_loop(prompt: object) -> None:
    engine = CountingEngine()
    answer = asyncio.run(ask(app_on(engine), prompt=prompt))
    assert answer.status_code == 200
    assert engine.threads.count(threading.get_ident()) == 0
    assert engine.threads


def test_each_token_id_is_decoded_once() -> None:
    engine = CountingEngine()
    app = app_on(engine)
    asyncio.run(ask(app, prompt=MANY))
    num_distinct = len({token for prompt in MANY for token in prompt})
    assert len(engine.threads) <= len(MANY) + num_distinct  # the texts of the prompts, and the table
    before = len(engine.threads)
    asyncio.run(ask(app, prompt=MANY[:1]))
    assert len(engine.threads) == before + 1


def test_the_event_loop_gets_turns_while_an_answer_is_built() -> None:
    engine = WaitingEngine()

    async def beat() -> None:
        while True:
            engine.turn.set()
            await asyncio.sleep(0)

    async def both() -> httpx.Response:
        beating = asyncio.create_task(beat())
        try:
            return await ask(app_on(engine), prompt=MANY[:2])
        finally:
            beating.cancel()

    assert asyncio.run(both()).status_code == 200


def test_the_loops_own_work_does_not_grow_with_the_answer() -> None:
    app = app_on(CountingEngine())
    few = num_calls_on_the_loop(app, [prompt[:5] for prompt in MANY])
    many = num_calls_on_the_loop(app, MANY)
    assert many < few + 400, (few, many)  # 4,000 tokens more


def num_calls_on_the_loop(app: FastAPI, prompt: list[list[int]]) -> int:
    """Functions called on this thread, which the loop runs on, for one answer."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    async def counted() -> None:
        await ask(app, prompt=prompt)  # fills the table
        sys.setprofile(note)
        try:
            answer = await ask(app, prompt=prompt)
        finally:
            sys.setprofile(None)
        assert len(answer.json()["choices"]) == len(prompt)

    asyncio.run(counted())
    return count


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": []}, "prompt is empty: give a text, texts, a list of token ids, or several"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ["a", ""]}, "prompt 1 is empty"),
        ({"prompt": [[1], []]}, "prompt 1 is empty"),
        ({"prompt": 5}, "prompt must be a text, texts, a list of token ids, or several lists"),
        ({"prompt": [["a"]]}, "prompt must be a text"),
        ({"prompt": {"text": "a"}}, "prompt must be a text"),
        ({"prompt": ["a"] * 1025}, "1025 prompts, at most 1024 in one request"),
        ({"prompt": ["a"] * 16, "n": 128, "max_tokens": 1}, "16 prompts times n = 128 are 2048 choices, at most 1024"),
        ({"prompt": "a" * 4_000_001}, "prompt has 4000001 characters, at most 4000000"),
        ({"prompt": [7] * 1_000_001}, "prompt has 1000001 tokens, at most 1000000"),
        ({"prompt": "a", "n": 129}, "less than or equal to 128"),
        ({"prompt": "a", "logprobs": 2}, "less than or equal to 1"),
    ],
)
def test_what_is_empty_or_too_large_is_refused_in_one_sentence(body: dict[str, Any], said: str) -> None:
    answer = asyncio.run(ask(app_on(FakeEngine()), **body))
    assert answer.status_code == 422, answer.text
    message = answer.json()["error"]["message"]
    assert said in message
    assert ";" not in message
    assert len(message) < 200
