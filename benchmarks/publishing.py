"""What publishing every step costs the training loop: the share of its time that the step waits.

    python -m benchmarks.publishing [--quick] [--json FILE]

A random Llama of 100 million parameters, float32 with AdamW at 5e-6, trains on real text (the project's pages) on one
CPU thread. After every step its weights are offered to the trainer's publisher: bfloat16 versions, a store on this
disk, Redis and SQLite. The loop waits for the snapshot only; comparing, packing, hashing and writing happen in the
publisher's thread. As many steps without publishing, before, show what that thread takes from the others.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from benchmarks.pushed_weights import SIZES, Size, build_llama, build_publisher, redis_in, train_step, training_batches
from benchmarks.report import Report, parser
from shared.database import WeightVersionRow, transaction
from trainer.publisher import WeightPublisher

LEARNING_RATE = 5e-6
FULL_EVERY = 10
GOAL_SHARE = 0.03


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--steps", type=int, default=10, help="published steps, and as many without publishing")
    given = options.parse_args()
    report = Report()
    size = replace(SIZES["5M"], batch=(4, 256)) if given.quick else replace(SIZES["100M"], batch=(2, 512))
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="headwater-publishing-") as folder, redis_in(Path(folder)) as client:
        model = build_llama(Path(folder) / "model", hidden=size.hidden, layers=size.layers, heads=size.heads)
        batches = training_batches(size, Path(folder) / "model")
        publisher = build_publisher(client, Path(folder) / "published", full_every=FULL_EVERY)
        _note_loop(report, size, _Loop(model, batches), publisher, num_steps=given.steps)
        _note_versions(report, size, publisher, num_steps=given.steps)
        publisher.close()
    report.figures["other load while measuring (1 min average)"] = os.getloadavg()[0]
    return report.finish(given.json)


class _Loop:
    def __init__(self, model: LlamaForCausalLM, batches: Iterator[Tensor]) -> None:
        self.model, self._batches = model, batches
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self) -> float:
        """Its seconds."""
        began = time.perf_counter()
        train_step(self.model, self._optimizer, next(self._batches))
        return time.perf_counter() - began


def _note_loop(report: Report, size: Size, loop: _Loop, publisher: WeightPublisher, *, num_steps: int) -> None:
    loop.step()  # makes the moments
    publisher.publish(loop.model, 0)
    alone = [loop.step() for _ in range(num_steps)]
    steps, waits = [], []
    for step in range(1, num_steps + 1):
        steps.append(loop.step())
        began = time.perf_counter()
        if publisher.is_due(step):
            publisher.begin(loop.model, step)
        waits.append(time.perf_counter() - began)
    began = time.perf_counter()
    publisher.wait()
    if publisher.offered_step != num_steps:
        publisher.publish(loop.model, num_steps)
    share = 100 * sum(waits) / (sum(steps) + sum(waits))
    report.figures[f"{size.name}: tokens a step"] = size.batch[0] * size.batch[1]
    report.figures[f"{size.name}: step without publishing, s"] = statistics.median(alone)
    report.figures[f"{size.name}: step beside the publisher, s"] = statistics.median(steps)
    report.figures[f"{size.name}: wait a step, ms"] = 1000 * statistics.median(waits)
    report.figures[f"{size.name}: longest wait, ms"] = 1000 * max(waits)
    report.at_most(f"{size.name}: the step waits for publication, % of the loop", share, 100 * GOAL_SHARE)
    report.figures[f"{size.name}: wait for the last version, once a run, s"] = time.perf_counter() - began


def _note_versions(report: Report, size: Size, publisher: WeightPublisher, *, num_steps: int) -> None:
    with transaction(publisher.run.database) as session:
        rows = [(row.form, row.num_bytes, row.seconds) for row in session.scalars(sa.select(WeightVersionRow))]
    report.figures[f"{size.name}: versions published, % of steps"] = 100 * (len(rows) - 1) / num_steps
    for form in ("full", "sparse"):
        of_form = [(num_bytes, seconds) for found, num_bytes, seconds in rows if found == form]
        if of_form:
            num_bytes, seconds = zip(*of_form, strict=True)
            report.figures[f"{size.name}: {form}, MB"] = statistics.median(num_bytes) / 1e6
            report.figures[f"{size.name}: {form}, s in the background"] = statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
