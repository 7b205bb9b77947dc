"""The part of benchmarks/weight_push.py that asks what a sparse update costs a replica, now and at another commit.

Each size runs in processes of its own (replica_update.py), with this code and with the other in turn, so that whatever
else the machine does falls on both. Bytes are exact; seconds are medians over all updates but a process's first, in
which the replica reads the model into memory once.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Report

SIZES = ("5M", "150M", "500M")
NUM_VERSIONS = 4
LIMIT_S = 1200.0
_ROOT = Path(__file__).parent.parent

Update = dict[str, float]


def measure_replica(report: Report, sizes: Sequence[str], *, other: Path | None, num_rounds: int) -> None:
    """`other`: the folder of a checkout to compare with."""
    codes = {"now": _ROOT} | ({"before": other} if other else {})
    for size in sizes:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
        for _ in range(num_rounds):
            for name, code in codes.items():
                runs[name].append(_run(size, code))
        for name in codes:
            _note(report, f"{size}, {name}", runs[name])


def _run(size: str, code: Path) -> dict[str, Any]:
    """One process that imports the packages in the folder `code`."""
    with tempfile.TemporaryDirectory(prefix="headwater-replica-") as folder:
        Path(folder, "benchmarks").symlink_to(_ROOT / "benchmarks")  # these measure both codes
        words = [sys.executable, "-m", "benchmarks.replica_update", size, str(NUM_VERSIONS), folder]
        environ = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} failed: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert found["code"] == str(code), f"{found['code']} was measured instead of {code}"
        return found


def _note(report: Report, name: str, runs: Sequence[dict[str, Any]]) -> None:
    later = [update for run in runs for update in run["updates"][1:]]
    report.figures[f"{name}: full, MB"] = 2 * runs[0]["parameters"] / 1e6
    report.figures[f"{name}: sparse, MB"] = statistics.median(runs[0]["sparse"]) / 1e6
    for kind in ("read", "written"):
        report.figures[f"{name}: {kind} at the first update, MB"] = runs[0]["updates"][0][kind] / 1e6
        report.figures[f"{name}: {kind} an update, MB"] = _median(later, kind) / 1e6
    for kind in ("seconds", "cpu", "fetch", "patch", "apply", "pause"):
        report.figures[f"{name}: {kind} an update, ms"] = 1000 * _median(later, kind)
    report.figures[f"{name}: peak memory of model, replica and publisher, MB"] = max(run["peak"] for run in runs) / 1e6


def _median(updates: Sequence[Update], kind: str) -> float:
    return statistics.median(update[kind] for update in updates)
