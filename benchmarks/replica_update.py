"""What one sparse update costs a replica: benchmarks/replica_costs.py starts a process for each size and code.

    python -m benchmarks.replica_update PARAMETERS NUM_VERSIONS FOLDER      (prints one line of JSON)

The packages come from PYTHONPATH, which may name an earlier commit's; only what both have may be imported. A random
Llama in bfloat16 under the engine `transformers`; every version moves SHARE of all elements by one unit in the last
place, as a step at a rate of 1e-6 does. All versions are made first; then a replica's watcher brings them in, one by
one. The kernel counts the bytes of this process's reads and writes (/proc/self/io), mapped files not among them.
"""

import asyncio
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import services
from benchmarks.pushed_weights import build_llama, build_publisher, redis_in
from services.engine.hf.engine import TransformersEngine
from services.rollout.watcher import WeightWatcher
from services.rollout.weight_copy import WeightCopy
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.weights.store import WeightStore

SHARE = 0.012
PHASES = ("fetch", "patch", "apply", "pause")
SHAPES = {"5M": (256, 6), "150M": (960, 13), "500M": (1536, 17)}
"""Hidden size, layers; of about so many parameters."""


def main(words: Sequence[str]) -> None:
    size, num_versions, folder = words[0], int(words[1]), Path(words[2])
    torch.set_num_threads(1)
    num_parameters = build(size, folder / "model")
    store, sizes = publish(folder, num_versions)
    found = asyncio.run(follow(folder, store, num_versions))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    code = str(Path(services.__file__).parent.parent)
    print(json.dumps({"code": code, "parameters": num_parameters, "sparse": sizes, "peak": peak, "updates": found}))


def build(size: str, folder: Path) -> int:
    hidden, layers = SHAPES[size]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = build_llama(folder, hidden=hidden, layers=layers, heads=hidden // 64)
    torch.set_default_dtype(torch.float32)
    return sum(parameter.numel() for parameter in model.parameters())


def publish(folder: Path, num_versions: int) -> tuple[str, list[int]]:
    """Version 0 in full, then `num_versions` sparse ones, by the trainer's own publisher. The store, and the bytes of
    each sparse version."""
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    with redis_in(folder) as client:
        publisher = build_publisher(client, folder, full_every=1_000_000)
        publisher.publish(model, 0)
        for version in range(1, num_versions + 1):
            _move(model, version)
            publisher.publish(model, version)
    store = publisher.store
    return store.root, [store.manifest(version).num_bytes for version in store.versions() if version]


@torch.no_grad()
def _move(model: LlamaForCausalLM, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        bits = parameter.view(torch.int16).view(-1)
        count = int(SHARE * len(bits))
        bits[torch.randint(len(bits), (count,), generator=draw)] += 1


async def follow(folder: Path, store: str, num_versions: int) -> list[dict[str, float]]:
    """Of each sparse update: seconds, those of this process's processors, bytes read and written, seconds by phase."""
    arriving = folder / "arriving"
    arriving.mkdir()
    settings = EngineSettings(model=str(folder / "model"), device="cpu", dtype="bfloat16", num_threads=1, timeout_s=600)
    engine = TransformersEngine(settings)
    watcher = WeightWatcher(
        store=WeightStore(str(arriving)),
        copy=WeightCopy(folder / "copy"),
        engine=engine,
        announced=None,
        record_event=refuse_events,
        poll_interval_s=1.0,
    )
    watcher.bind(asyncio.get_running_loop())
    await engine.start()
    found = []
    for version in range(num_versions + 1):
        source = Path(store) / f"v{version:08d}"
        shutil.copytree(source, arriving / source.name)
        before = _now()
        await asyncio.to_thread(watcher.check if version else watcher.catch_up)
        assert engine.weight_version == version, watcher.detail
        found.append({name: value - before[name] for name, value in _now().items()})
    await engine.close()
    return found[1:]


def refuse_events(kind: str, message: str, **data: object) -> None:
    raise SystemExit(f"a version was refused: {message}")


def phase_seconds() -> dict[str, float]:
    """Of this process's weight loads so far."""
    name = "headwater_weight_load_seconds_sum"
    return {phase: metrics.REGISTRY.get_sample_value(name, {"phase": phase}) or 0.0 for phase in PHASES}


def _now() -> dict[str, float]:
    words = Path("/proc/self/io").read_text(encoding="ascii").split()
    return {
        "seconds": time.perf_counter(),
        "cpu": time.process_time(),
        "read": int(words[words.index("rchar:") + 1]),
        "written": int(words[words.index("wchar:") + 1]),
        **phase_seconds(),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
