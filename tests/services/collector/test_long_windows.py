"""A window of 128k tokens on its whole way: one request to each service, a few MB, nothing lost or cut."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from services.collector.clients import build_services, http_client
from services.collector.collect import DroppedWindow, collect
from services.collector.windows import Chunk, TextSpan, Window, WindowText
from services.judge.app import build_app
from shared.records import ScoredWindow, WindowKey
from shared.redis import connect
from shared.settings import Secrets, Settings
from shared.stream import StreamEntry, WindowStream
from tests.services.collector.processes import RedisProcess
from tests.services.serving import running
from trainer.preferences import select_pairs

SUFFIX, ROLLOUTS = 128, 4
SCORER = {"criteria": {"python": {"function": "tests.services.judge.scorers:counts_on"}}}


def text_of(ids: Sequence[int]) -> str:
    """Token 7 reads ` 007`: four characters each."""
    return "".join(f" {number:03d}" for number in ids)


def counting_window(num_tokens: int) -> tuple[Window, WindowText]:
    """Tokens 0, 1, 2, ... modulo 1000, in chunks of 128 after the first 128."""
    ids = tuple(number % 1000 for number in range(num_tokens))
    chunks = tuple(Chunk(start, start + SUFFIX) for start in range(SUFFIX, num_tokens, SUFFIX))
    key = WindowKey(part=0, epoch=0, position=0, window=0)
    spans = tuple(TextSpan(4 * chunk.start, 4 * chunk.end) for chunk in chunks)
    return Window(key, "d0", ids, chunks, read_at=0.0), WindowText(text_of(ids), spans)


@dataclass
class Services(httpx.AsyncBaseTransport):
    """Rollout and rewriter answer here, at once; the judge is the real one, at its address."""

    inner: httpx.AsyncBaseTransport = field(default_factory=httpx.AsyncHTTPTransport)
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    num_requests: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body, path = await request.aread(), request.url.path
        self.num_requests[path] += 1
        self.num_bytes[path] += len(body)
        if path == "/v1/judgements":
            return await self.inner.handle_async_request(request)
        asked = orjson.loads(body)
        if path == "/v1/rewrites":
            return httpx.Response(200, content=orjson.dumps({"rewrites": [[self._made()] for _ in asked["items"]]}))
        groups = [[self._made() | {"weight_version": 3} for _ in range(asked["num_rollouts"])] for _ in asked["starts"]]
        return httpx.Response(200, content=orjson.dumps({"rollouts": groups}))

    def _made(self) -> dict[str, Any]:
        """Never one that counts on: all begin with 1, and chunks begin with multiples of 8."""
        ids = [1, *self.draw.choices(range(1000), k=SUFFIX - 1)]
        return {"token_ids": ids, "text": text_of(ids), "finish_reason": "length"}


def collected(num_tokens: int) -> tuple[ScoredWindow, Services]:
    window, text = counting_window(num_tokens)
    data = {"chunks": {"context_tokens": num_tokens}, "collector": {"schedule": [{"num_rollouts": ROLLOUTS}]}}
    settings = Settings.model_validate(data | {"judge": SCORER})
    services = Services()
    found: list[ScoredWindow | DroppedWindow] = []

    async def run(url: str) -> None:
        asking = Settings.model_validate(data | {"judge": SCORER | {"url": url}})
        async with http_client(asking, token="word", transport=services) as http:
            stage, clients = asking.collector.schedule[0], build_services(asking, http)
            found.append(await collect(window, text, stage=stage, services=clients, settings=asking))

    with running(build_app(settings, Secrets(token="word"))) as url:
        asyncio.run(run(url))
    (document,) = found
    assert isinstance(document, ScoredWindow), document
    return document, services


def test_a_window_of_128k_tokens_goes_all_the_way(redis_server: RedisProcess) -> None:
    document, services = collected(131_072)
    assert services.num_requests == {"/v1/rollouts": 1, "/v1/rewrites": 1, "/v1/judgements": 1}
    assert (len(document.chunks), document.dropped_chunks) == (1023, ())
    # The scorer saw each chunk's own prefix and suffix: only the original counts on.
    assert {chunk.judgement.rewards for chunk in document.chunks if chunk.judgement} == {(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}
    stream = WindowStream(connect(redis_server.url, timeout_s=10), f"run-{uuid.uuid4().hex[:12]}")
    stream.create()
    stream.write(document)
    (entry,) = stream.read(count=1, block_s=1)
    assert isinstance(entry, StreamEntry)
    assert entry.window == document
    assert len(select_pairs(entry.window, "dpo", min_reward_gap=0.0, seed=0).pairs) == 1023


def test_the_judges_request_grows_with_the_window_not_with_its_square() -> None:
    """The window's text once (4 characters a token), six candidates a chunk (512 characters each), and less than 200
    bytes a chunk around them."""
    sizes = {}
    for num_tokens in (8_192, 32_768):
        document, services = collected(num_tokens)
        sizes[num_tokens] = services.num_bytes["/v1/judgements"]
        texts = 4 * num_tokens + sum(512 * len(chunk.candidates) for chunk in document.chunks)
        assert texts < sizes[num_tokens] < texts + 200 * len(document.chunks)
    assert sizes[32_768] < 4.1 * sizes[8_192]
    # So 128k tokens make four times the larger: 3.9 MB.
    assert 4 * sizes[32_768] < 4_000_000
