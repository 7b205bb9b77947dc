"""Rollout, rewriter and judge that answer at once with answers made before: a process of benchmarks/collector.py.

    python -m benchmarks.instant_services PORT

Only the shape of a request is looked at (how many chunks, how many candidates); bodies are kept by shape.
"""

import random
import sys
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import orjson
import uvicorn

VOCABULARY_SIZE = 4096

_WORDS = ["the", "moon", "moves", "around", "earth", "water", "boils", "mountain", "river", "town", "bridge"]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: _Send) -> None:
    """The ASGI application."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    answer = _answer(scope["path"], orjson.loads(body))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def _answer(path: str, request: dict[str, Any]) -> bytes:
    if path == "/v1/rollouts":
        return _rollouts(tuple(request["max_suffix_tokens"]), request["num_rollouts"])
    if path == "/v1/rewrites":
        return _rewrites(tuple(item["max_suffix_tokens"] for item in request["items"]))
    return _judgements(tuple(len(item["candidates"]) for item in request["items"]))


@lru_cache
def _rollouts(bounds: tuple[int, ...], num_rollouts: int) -> bytes:
    rollouts = [[_continuation(bound) | {"weight_version": 3} for _ in range(num_rollouts)] for bound in bounds]
    return orjson.dumps({"rollouts": rollouts})


@lru_cache
def _rewrites(bounds: tuple[int, ...]) -> bytes:
    return orjson.dumps({"rewrites": [[_continuation(bound) | {"refusal": ""}] for bound in bounds]})


@lru_cache
def _judgements(sizes: tuple[int, ...]) -> bytes:
    return orjson.dumps({"judgements": [_judgement(size) for size in sizes]})


def _continuation(suffix_tokens: int) -> dict[str, Any]:
    return {
        "token_ids": [random.randrange(VOCABULARY_SIZE) for _ in range(suffix_tokens)],
        "text": " ".join(random.choice(_WORDS) for _ in range(suffix_tokens)),
        "finish_reason": "length",
    }


def _judgement(num_candidates: int) -> dict[str, Any]:
    rewards = [random.random() for _ in range(num_candidates)]
    return {
        "rewards": rewards,
        "scores": {"quality": rewards},
        "reasoning": "The first one follows the text before it; the second changes its subject. Verdict: 1",
        "num_calls": num_candidates * (num_candidates - 1) // 2,
        "num_failures": 0,
        "fingerprint": "instant",
    }


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
