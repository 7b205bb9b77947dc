"""An OpenAI-compatible endpoint that answers as told and notes what it was asked, on a real server."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.engine.openai import OpenAIEngine
from shared.engine_settings import EngineSettings
from tests.services.serving import running

T = TypeVar("T")


@dataclass
class Endpoint:
    """It has /chat/completions, and /completions where `has_completions`."""

    answer: str = ""
    """Empty: "answer 0", "answer 1", ... by sample."""
    top: dict[str, float] = field(default_factory=lambda: {" yes": -0.5, " no": -1.5})
    """Listed for every token, as far as `most_top` allows."""
    most_top: int = 20
    tokens: list[str] = field(default_factory=list)
    """That its answers have, where log-probs are asked for; empty: one."""
    patterned: str = ""
    """Its answer to requests with a pattern; empty: it ignores patterns."""
    refused: tuple[str, ...] = ()
    """Requests with one of these fields are answered 400."""
    ignores_n: bool = False
    has_completions: bool = False
    finish_reason: str = "stop"
    raw: str | None = None
    """The body of every answer in place of the scripted one."""
    message: dict[str, Any] = field(default_factory=dict)
    """Further fields of its messages."""
    status: int = 200
    error: dict[str, Any] = field(default_factory=lambda: {"message": "no"})
    headers: dict[str, str] = field(default_factory=lambda: {"retry-after": "0.001"})
    num_failures: int = 0
    """The next so many requests fail with `status`."""
    num_starting: int = 0
    """The next so many requests for its models are answered 503."""
    asked: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/readyz")
        async def ready() -> dict[str, str]:
            return {}

        @app.get("/v1/models")
        async def models() -> Response:
            if self.num_starting:
                self.num_starting -= 1
                return JSONResponse({"error": {"message": "loading"}}, status_code=503, headers={"retry-after-ms": "1"})
            return JSONResponse({"object": "list", "data": [{"id": "policy"}]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return self._respond(await request.json())

        @app.post("/v1/completions")
        async def completions(request: Request) -> Response:
            if not self.has_completions:
                return JSONResponse({"error": {"message": "no such route"}}, status_code=404)
            return self._respond(await request.json())

        return app

    def _respond(self, body: dict[str, Any]) -> Response:
        self.asked.append(body)
        if self.num_failures:
            self.num_failures -= 1
            return JSONResponse({"error": self.error}, status_code=self.status, headers=self.headers)
        if found := set(self.refused) & body.keys():
            return JSONResponse({"error": {"message": f"unknown field {found.pop()}"}}, status_code=400)
        if max(body.get("top_logprobs", 0), int(body.get("logprobs") or 0)) > self.most_top:
            return JSONResponse({"error": {"message": f"at most {self.most_top} log-probs"}}, status_code=400)
        if self.raw is not None:
            return Response(self.raw, media_type="text/html")
        number = 1 if self.ignores_n else body.get("n", 1)
        make = self._chat_choice if "messages" in body else self._plain_choice
        choices = [make(body, index) | {"index": index, "finish_reason": self.finish_reason} for index in range(number)]
        return JSONResponse({"id": "1", "object": "x", "created": 0, "model": body["model"], "choices": choices})

    def _text(self, body: dict[str, Any], index: int) -> str:
        pattern = self.patterned if "structured_outputs" in body else ""
        return pattern or self.answer or f"answer {index}"

    def _chat_choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in self.top.items()]
        own = [{"token": token, "logprob": -9.0, "bytes": list(token.encode())} for token in self.tokens] or top[:1]
        content = [{**token, "top_logprobs": top} for token in own]
        logprobs = {"content": content, "refusal": None} if body.get("logprobs") and top else None
        return {
            "message": {"role": "assistant", "content": self._text(body, index)} | self.message,
            "logprobs": logprobs,
        }

    def _plain_choice(self, body: dict[str, Any], index: int) -> dict[str, Any]:
        tokens = self.tokens or ["x"]
        offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [-9.0] * len(tokens),
            "top_logprobs": [self.top] * len(tokens),
            "text_offset": offsets,
        }
        return {"text": self._text(body, index), "logprobs": logprobs if body.get("logprobs") and self.top else None}


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[str]:
    with running(endpoint.app()) as url:
        yield url


def with_engine(
    url: str, work: Callable[[OpenAIEngine], Awaitable[T]], *, constrains: bool = False, **settings: Any
) -> T:
    """What `work` returns with a started engine."""

    async def run() -> T:
        named = EngineSettings(kind="openai", endpoint=f"{url}/v1", **{"model": "policy", **settings})
        engine = OpenAIEngine(named, constrains=constrains)
        try:
            await asyncio.wait_for(engine.start(), 60)
            return await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.close()

    return asyncio.run(run())
