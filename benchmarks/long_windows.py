"""Claim: a window of 128k tokens costs the collector about a second of CPU, and its requests grow with it, not with
its square.

    python -m benchmarks.long_windows [--quick] [--json FILE]

One window after another of 2k, 8k, 32k and 128k tokens, suffixes of 128, with 4 and with 16 rollouts, goes through this
process as through a collector: its text is found, the three services are asked over real HTTP (a process that answers
at once: benchmarks/instant_services.py), and what comes back is written to a real Redis. CPU seconds are this process's
own, so other work on the machine leaves them alone. Bytes are those of each request's body.
"""

import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections import Counter
from itertools import product
from pathlib import Path

import httpx

from benchmarks.collector import free_ports, run_settings, surroundings, write_documents, write_tokenizer
from benchmarks.report import Report, parser
from services.collector.clients import build_services, http_client
from services.collector.collect import collect
from services.collector.sources.base import Document
from services.collector.windows import PolicyTokenizer, Window, WindowMaker
from shared.errors import StreamError
from shared.records import ScoredWindow
from shared.redis import connect
from shared.settings import Settings
from shared.stream import WindowStream

SIZES = (2048, 8192, 32_768, 131_072)
ROLLOUTS = (4, 16)
GOAL_JUDGE_REQUEST_MB = {4: 5.0}
_START_S = 60


@dataclasses.dataclass
class Counting(httpx.AsyncBaseTransport):
    """Notes the bytes of every request's body by its path."""

    inner: httpx.AsyncBaseTransport = dataclasses.field(default_factory=httpx.AsyncHTTPTransport)
    num_bytes: Counter[str] = dataclasses.field(default_factory=Counter)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.num_bytes[request.url.path] += len(await request.aread())
        return await self.inner.handle_async_request(request)


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", num_documents=1, num_words=SIZES[-1])
        write_tokenizer(folder / "tokenizer", folder / "documents.jsonl")
        redis_port, services_port = free_ports(2)
        with surroundings(folder, redis_port, services_port):
            for size, num_rollouts in product(SIZES[:2] if given.quick else SIZES, ROLLOUTS):
                data = run_settings(
                    folder, {"context_tokens": size}, num_rollouts, redis_port=redis_port, services_port=services_port
                )
                data["run"]["name"] = f"window-{size}-{num_rollouts}"
                asyncio.run(_measure(report, Settings.model_validate(data)))
    for num_rollouts, goal in GOAL_JUDGE_REQUEST_MB.items():
        name = f"{SIZES[-1]} tokens, K = {num_rollouts}: judge request, MB"
        if name in report.figures:
            report.at_most(name, float(report.figures[name]), goal)
    return report.finish(given.json)


async def _measure(report: Report, settings: Settings) -> None:
    stage = settings.collector.schedule[0]
    name = f"{settings.chunks.context_tokens} tokens, K = {stage.num_rollouts}"
    tokenizer = PolicyTokenizer(settings.policy.tokenizer_source)
    stream = _stream(settings)
    window = _window(settings, tokenizer)
    transport = Counting()
    began = time.process_time()
    text = tokenizer.show(window.token_ids, window.chunks)
    shown = time.process_time()
    async with http_client(settings, token="", transport=transport) as http:
        services = build_services(settings, http)
        document = await collect(window, text, stage=stage, services=services, settings=settings)
    assert isinstance(document, ScoredWindow), document
    stream.write(document)
    report.figures[f"{name}: judge request, MB"] = transport.num_bytes["/v1/judgements"] / 1e6
    report.figures[f"{name}: rewriter request, MB"] = transport.num_bytes["/v1/rewrites"] / 1e6
    report.figures[f"{name}: rollout request, MB"] = transport.num_bytes["/v1/rollouts"] / 1e6
    report.figures[f"{name}: CPU seconds to find its text"] = shown - began
    report.figures[f"{name}: CPU seconds of all else"] = time.process_time() - shown


def _window(settings: Settings, tokenizer: PolicyTokenizer) -> Window:
    """The first one of the document, which is longer than it."""
    line = Path(settings.documents.path).read_text(encoding="utf-8").splitlines()[0]
    document = Document(position=0, source_id="d0", content=json.loads(line)["text"])
    return WindowMaker(tokenizer, settings.chunks, settings.run.seed).windows(document, part=0, epoch=0)[0]


def _stream(settings: Settings) -> WindowStream:
    stream = WindowStream(connect(settings.redis.url, timeout_s=30), settings.run.name)
    deadline = time.monotonic() + _START_S
    while True:
        try:
            stream.create()
        except StreamError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return stream


if __name__ == "__main__":
    sys.exit(main())
