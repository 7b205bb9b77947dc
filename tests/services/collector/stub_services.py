"""One ASGI app that answers as rollout, rewriter and judge would, and remembers what it was asked.

The text of every answer is what its token ids decode to, under the tokenizer of the collector's tests.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shared.api import JudgementRequest, RewriteItem, RewriteRequest, RolloutRequest
from tests.services.collector.conftest import make_tokenizer

Interference = Callable[[str, Any], Response | None]
"""May answer in the service's place: gets path and body."""


def instead(wanted: str, answer: Callable[[Any], Any], *, first_only: bool = False) -> Interference:
    """Answers requests of one path with `answer(body)`: a Response, or the content of one."""
    asked = count()

    def interfere(path: str, body: Any) -> Response | None:
        if path != wanted or (next(asked) and first_only):
            return None
        found = answer(body)
        return found if isinstance(found, Response) else JSONResponse(found)

    return interfere


@dataclass
class StubServices:
    """Rollout i of a chunk is ` roll i`, or the end of it where that is too long; rewrite i is the suffix in
    capitals and i exclamation marks, cut to its length in tokens; the reward falls with the index."""

    interfere: Interference = lambda path, body: None
    seconds: float = 0.0
    """How long each answer takes."""
    held: set[str] = field(default_factory=set)
    """Paths whose answers wait until they are taken out of here."""
    requests: list[tuple[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_now: int = 0
    max_at_once: int = 0

    @property
    def app(self) -> Starlette:
        routes = {"/v1/rollouts": _rollouts, "/v1/rewrites": _rewrites, "/v1/judgements": _judgements}
        return Starlette(
            routes=[Route(path, self._endpoint(path, answer), methods=["POST"]) for path, answer in routes.items()]
        )

    def bodies(self, path: str) -> list[Any]:
        return [body for asked, body in self.requests if asked == path]

    def _endpoint(self, path: str, answer: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            body = await request.json()
            self.requests.append((path, body))
            self.headers.append(dict(request.headers))
            # Decided at arrival: tests count the requests before this one, and others may come while it waits.
            interference = self.interfere(path, body)
            self.num_now += 1
            self.max_at_once = max(self.max_at_once, self.num_now)
            try:
                await asyncio.sleep(self.seconds)
                while path in self.held:  # noqa: ASYNC110 - emptied by another thread
                    await asyncio.sleep(0.01)
                return interference or JSONResponse(answer(body))
            finally:
                self.num_now -= 1

        return endpoint


@cache
def _tokenizer() -> Any:
    return make_tokenizer(adds_bos=False)


def _encoded(text: str) -> list[int]:
    found: list[int] = _tokenizer().encode(text, add_special_tokens=False)
    return found


def _answer(token_ids: list[int]) -> dict[str, Any]:
    """Without the bytes of a character that was cut at the end."""
    while (text := _tokenizer().decode(token_ids, clean_up_tokenization_spaces=False)).endswith("\ufffd"):
        token_ids = token_ids[:-1]
    return {"token_ids": token_ids, "text": text}


def _rollouts(body: Any) -> dict[str, Any]:
    request = RolloutRequest.model_validate(body)

    def rollout(index: int, max_tokens: int) -> dict[str, Any]:
        token_ids = _encoded(f" roll {index}")[-max_tokens:]
        return _answer(token_ids) | {"finish_reason": "length", "weight_version": 3}

    return {"rollouts": [[rollout(index, bound) for index in range(request.num_rollouts)] for bound in request.bounds]}


def _rewrites(body: Any) -> dict[str, Any]:
    request = RewriteRequest.model_validate(body)

    def rewrite(item: RewriteItem, index: int) -> dict[str, Any]:
        token_ids = _encoded(f"{request.suffix(item).upper()}{'!' * index}")
        return _answer(token_ids[-item.max_suffix_tokens :]) | {"finish_reason": "stop"}

    return {"rewrites": [[rewrite(item, index) for index in range(request.num_rewrites)] for item in request.items]}


def _judgements(body: Any) -> dict[str, Any]:
    request = JudgementRequest.model_validate(body)
    return {"judgements": [judgement(len(item.candidates)) for item in request.items]}


def judgement(num_candidates: int) -> dict[str, Any]:
    rewards = [1.0 - index / num_candidates for index in range(num_candidates)]
    return {"rewards": rewards, "scores": {"quality": rewards}, "num_calls": 1, "fingerprint": "stub"}
