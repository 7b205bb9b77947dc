"""Claim: one judge process scores 450 candidates a second with an engine that answers at once, and its event loop never
stands still for 50 ms.

    python -m benchmarks.judge [--quick] [--json FILE]

The real judge in a process of its own (benchmarks/judge_server.py), real HTTP, a real tokenizer; only the engine is
simulated. Windows of 8,000 characters before the first of 4 chunks with 18 candidates of 550 characters; `quality` by
tournament, once with sampled and once with graded verdicts. Verdicts are coin flips: a tournament spends its whole
budget on them. 8 windows are in flight.

Candidates a second are of wall time; those a CPU second stand beside them, since the driver shares the machine. The
longest block is that between two beats of a task in the judge's event loop.
"""

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.collector import free_ports, process, write_documents, write_tokenizer
from benchmarks.judge_server import EngineOptions, command
from benchmarks.report import Report, parser
from shared.settings import Settings

GOAL_PER_SECOND, GOAL_BLOCK_S = 450, 0.05
PREFIX_CHARACTERS, SUFFIX_CHARACTERS, NUM_CHUNKS, NUM_CANDIDATES = 8000, 550, 4, 18
IN_FLIGHT = 8


@dataclass(frozen=True)
class Measured:
    num_candidates: int
    num_calls: float
    num_bytes: int
    wall_s: float
    cpu_s: float
    longest_block_s: float
    longest_block_cpu_s: float


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--windows", type=int, default=64, help="windows of 72 candidates")
    given = options.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", num_documents=200, num_words=2500)
        write_tokenizer(folder / "tokenizer", folder / "documents.jsonl")
        for verdicts in ("sampled", "graded"):
            engine = EngineOptions(str(folder / "tokenizer"), grades=verdicts == "graded")
            found = measure(folder, engine, num_windows=4 if given.quick else given.windows)
            _add(report, verdicts, found)
    report.figures["other load while measuring (1 min average)"] = os.getloadavg()[0]
    return report.finish(given.json)


def _add(report: Report, name: str, found: Measured) -> None:
    figures = report.figures
    report.at_least(f"{name}: candidates a second", found.num_candidates / found.wall_s, GOAL_PER_SECOND)
    figures[f"{name}: candidates a CPU second"] = found.num_candidates / found.cpu_s
    report.at_most(f"{name}: longest block of the event loop, s", found.longest_block_s, GOAL_BLOCK_S)
    figures[f"{name}: longest block, CPU seconds of its thread"] = found.longest_block_cpu_s
    figures[f"{name}: engine calls a candidate"] = found.num_calls / found.num_candidates
    figures[f"{name}: bytes of requests a candidate"] = found.num_bytes / found.num_candidates


def measure(folder: Path, engine: EngineOptions, *, num_windows: int) -> Measured:
    """The first window warms the judge up and does not count."""
    texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").open(encoding="utf-8")]
    bodies = [make_body(index, texts[index % len(texts)]) for index in range(num_windows + 1)]
    with judge_process({"judge": {"criteria": {"quality": {}}}}, engine, log=folder / "log") as url:
        return asyncio.run(_drive(url, bodies))


@contextmanager
def judge_process(settings: dict[str, Any], engine: EngineOptions, *, log: Path) -> Iterator[str]:
    """Its address, once it is ready."""
    Settings.model_validate(settings)  # a mistake is shown here rather than in its log
    (port,) = free_ports(1)
    with process(command(port, settings, engine), log) as judge:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while not _is_ready(url):
            if judge.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the judge did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
            time.sleep(0.1)
        yield url


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def make_body(index: int, text: str) -> bytes:
    """A request with candidates of its own, so that nothing is remembered from another one."""
    draw = random.Random(index)
    need = PREFIX_CHARACTERS + NUM_CHUNKS * SUFFIX_CHARACTERS
    assert len(text) >= need, f"documents must have {need} characters"
    items = []
    for place in range(NUM_CHUNKS):
        start = PREFIX_CHARACTERS + place * SUFFIX_CHARACTERS
        cuts = [draw.randrange(len(text) - SUFFIX_CHARACTERS) for _ in range(NUM_CANDIDATES)]
        candidates = [{"text": f" {index}.{n} {text[cut : cut + SUFFIX_CHARACTERS]}"} for n, cut in enumerate(cuts)]
        items.append({"start": start, "end": start + SUFFIX_CHARACTERS, "candidates": candidates})
    return json.dumps({"text": text[:need], "items": items, "seed": index}).encode()


async def _drive(url: str, bodies: list[bytes]) -> Measured:
    limits = httpx.Limits(max_connections=IN_FLIGHT)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        await _judge(client, bodies[0])
        before = (await client.get("/benchmark")).json()
        started = time.perf_counter()
        room = asyncio.Semaphore(IN_FLIGHT)

        async def in_turn(body: bytes) -> int:
            async with room:
                return await _judge(client, body)

        scored = await asyncio.gather(*(in_turn(body) for body in bodies[1:]))
        wall_s = time.perf_counter() - started
        after = (await client.get("/benchmark")).json()
    return Measured(
        num_candidates=sum(scored),
        num_calls=after["num_served"] - before["num_served"],
        num_bytes=sum(map(len, bodies[1:])),
        wall_s=wall_s,
        cpu_s=after["cpu_s"] - before["cpu_s"],
        longest_block_s=after["longest_block_s"],
        longest_block_cpu_s=after["longest_block_cpu_s"],
    )


async def _judge(client: httpx.AsyncClient, body: bytes) -> int:
    """How many candidates were scored; all must be."""
    answer = await client.post("/v1/judgements", content=body, headers={"Content-Type": "application/json"})
    answer.raise_for_status()
    judgements = answer.json()["judgements"]
    assert all("rewards" in judgement for judgement in judgements), judgements
    return sum(len(judgement["rewards"]) for judgement in judgements)


if __name__ == "__main__":
    sys.exit(main())
