"""Claim: at 1 % failed engine calls a judge keeps 95 % of its goodput, and when it has more to do than it can answer in
time, less than 5 % of its work is thrown away.

    python -m benchmarks.goodput [--quick] [--rate CALLS_A_SECOND] [--json FILE]

The real judge in a process of its own over a simulated engine (benchmarks/judge_server.py), asked by the collector's
real client over real HTTP with `collector.request_timeout_s`, in a scaled world:

    work   windows of 15 chunks with 8 candidates, all pairs in both orders: 840 calls. A window of 18 candidates has
           4,590, so an engine of 400 calls a second serves 73 of these: a window takes as long as there.
    time   runs faster, so that the engine serves `--rate` calls in a second of ours; lower it on a busy machine. The
           engine's latency, the request timeout, the back-off and the patience shrink alike. The first wait after a
           failure (0.25 s) stays, which makes failures dearer than they are.

Thrown away is what the engine served beyond the calls of the windows that were answered. A run ends when all windows
are answered, or after as long as the engine needs for three times their calls.
"""

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.collector import write_documents, write_tokenizer
from benchmarks.judge import judge_process
from benchmarks.judge_server import EngineOptions
from benchmarks.report import Report, parser
from services.collector.clients import Services, build_services, http_client
from shared.api import JudgementFailure, JudgementRequest
from shared.settings import Settings

NUM_CHUNKS, NUM_CANDIDATES = 15, 8
CALLS, REAL_CALLS = NUM_CHUNKS * NUM_CANDIDATES * (NUM_CANDIDATES - 1), 4590
LATENCY_S, TIMEOUT_S, BACKOFF_S, PATIENCE_S = 2.0, 600.0, 30.0, 30.0
MAX_WORK = 3.0
"""Times the calls of all windows that the engine may serve before a run is stopped."""
GOAL_GOODPUT, GOAL_THROWN_AWAY = 0.95, 0.05


@dataclass(frozen=True)
class Scenario:
    rate: float
    """Calls a second of the real world."""
    in_flight: int
    num_windows: int
    wall_rate: float
    """Calls a second of ours."""
    error_rate: float = 0.0

    @property
    def speed(self) -> float:
        """Seconds of the real world in one of ours."""
        return self.wall_rate / (self.rate * CALLS / REAL_CALLS)


@dataclass(frozen=True)
class Outcome:
    num_answered: int
    num_failed_chunks: int
    num_served: int
    seconds: float
    """Of the real world."""

    @property
    def thrown_away(self) -> float:
        return 1.0 - self.num_answered * CALLS / self.num_served

    @property
    def goodput(self) -> float:
        """Answered windows a second of the real world."""
        return self.num_answered / self.seconds


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rate", type=float, default=1200.0, help="engine calls in a second of wall time")
    given = options.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        write_documents(folder / "documents.jsonl", num_documents=50, num_words=500)
        write_tokenizer(folder / "tokenizer", folder / "documents.jsonl")
        _failing(report, folder, num_windows=16 if given.quick else 48, wall_rate=given.rate)
        for rate in (100.0, 400.0):
            scenario = Scenario(rate, in_flight=64, num_windows=64 if given.quick else 96, wall_rate=given.rate)
            _overloaded(report, run(folder, scenario), rate)
    return report.finish(given.json)


def _failing(report: Report, folder: Path, *, num_windows: int, wall_rate: float) -> None:
    goodput = {}
    for error_rate in (0.0, 0.01):
        scenario = Scenario(400.0, in_flight=16, num_windows=num_windows, wall_rate=wall_rate, error_rate=error_rate)
        found = run(folder, scenario)
        goodput[error_rate] = found.goodput
        name = f"{error_rate:.0%} failed calls"
        report.figures[f"{name}: windows an hour"] = 3600 * found.goodput
        report.figures[f"{name}: chunks that failed"] = found.num_failed_chunks
    report.at_least("goodput at 1 % failed calls against none", goodput[0.01] / goodput[0.0], GOAL_GOODPUT)


def _overloaded(report: Report, found: Outcome, rate: float) -> None:
    name = f"64 windows in flight, {rate:.0f} calls a second"
    report.figures[f"{name}: answered windows"] = found.num_answered
    report.figures[f"{name}: windows an hour"] = 3600 * found.goodput
    report.at_most(f"{name}: work thrown away", found.thrown_away, GOAL_THROWN_AWAY)


def run(folder: Path, scenario: Scenario) -> Outcome:
    speed = scenario.speed
    engine = EngineOptions(
        str(folder / "tokenizer"), rate=scenario.wall_rate, latency_s=LATENCY_S / speed, error_rate=scenario.error_rate
    )
    criterion = {"schedule": "all_pairs", "samples": 2}
    in_time = {"engine": {"timeout_s": TIMEOUT_S / speed}}
    judge = in_time | {"criteria": {"quality": criterion}, "engine_patience_s": PATIENCE_S / speed}
    with judge_process({"judge": judge}, engine, log=folder / "log") as url:
        collector = {
            "request_timeout_s": TIMEOUT_S / speed,
            "max_backoff_s": BACKOFF_S / speed,
            "max_windows_in_flight": scenario.in_flight,
        }
        services = {"rollout": in_time, "rewriter": in_time, "judge": judge | {"url": url}}
        settings = Settings.model_validate(services | {"collector": collector})
        return asyncio.run(_drive(settings, scenario))


async def _drive(settings: Settings, scenario: Scenario) -> Outcome:
    room, num_answered, num_failed = asyncio.Semaphore(scenario.in_flight), 0, 0
    async with http_client(settings, token="") as http:
        services = build_services(settings, http)
        began, before = time.monotonic(), await _num_served(settings)

        async def judge_window(index: int) -> None:
            nonlocal num_answered, num_failed
            async with room:
                failed = await _judge(services, index)
            num_answered, num_failed = num_answered + 1, num_failed + failed

        longest_s = MAX_WORK * scenario.num_windows * CALLS / scenario.wall_rate
        windows = [asyncio.create_task(judge_window(index)) for index in range(scenario.num_windows)]
        _, late = await asyncio.wait(windows, timeout=longest_s)
        seconds, after = time.monotonic() - began, await _num_served(settings)
        for window in late:
            window.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    await asyncio.gather(*(window for window in windows if window not in late))  # raises what went wrong
    return Outcome(num_answered, num_failed, after - before, seconds * scenario.speed)


async def _num_served(settings: Settings) -> int:
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        return int((await client.get(f"{settings.judge.base_urls[0]}/benchmark")).json()["num_served"])


async def _judge(services: Services, index: int) -> int:
    """How many of the window's chunks could not be scored."""
    answer = await services.judge.judge(lambda _with_token_ids: make_request(index), document=str(index))
    return sum(isinstance(judgement, JudgementFailure) for judgement in answer.judgements)


def make_request(index: int) -> JudgementRequest:
    """A window like no other, so that only what was asked for itself is remembered of it."""
    items: list[dict[str, Any]] = []
    text = f"Window {index}."
    for chunk in range(NUM_CHUNKS):
        suffix = f" Suffix {chunk}."
        candidates = [{"text": f" Candidate {number} of chunk {chunk}."} for number in range(NUM_CANDIDATES)]
        items.append({"start": len(text), "end": len(text) + len(suffix), "candidates": candidates})
        text += suffix
    return JudgementRequest.model_validate_json(json.dumps({"text": text, "items": items, "seed": index}))


if __name__ == "__main__":
    sys.exit(main())
