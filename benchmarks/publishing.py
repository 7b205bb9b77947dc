"""What publishing every step, and a checkpoint now and then, costs the loop: the share of its time that the step waits.

    python -m benchmarks.publishing [--quick] [--blocks 2] [--steps 10] [--json FILE]

A random Llama of 100 million parameters, float32 with AdamW at 5e-6, trains on real text (the project's pages) on one
CPU thread. Blocks of steps alternate, so that other load on the machine meets both kinds:

    block without      steps alone
    block with         after every step its weights go to the trainer's publisher (bfloat16 versions, a store on this
                       disk, Redis, SQLite), and after the middle step a checkpoint is begun

As in the trainer, the loop waits for the copies only. Comparing, packing, hashing and writing happen in the threads of
publisher and checkpoint; their last work is waited for between two blocks, outside all figures of the steps.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import sqlalchemy as sa
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from benchmarks.pushed_weights import SIZES, Size, build_llama, build_publisher, redis_in, training_batches
from benchmarks.report import Report, parser
from shared.checkpoint_state import CheckpointState
from shared.database import WeightVersionRow, transaction
from shared.settings import Settings, TrainerSettings
from trainer.checkpoint import Checkpoints
from trainer.optimizer import PolicyOptimizer
from trainer.policy import Policy, load_policy
from trainer.publisher import WeightPublisher
from trainer.ranks import Ranks

LEARNING_RATE = 5e-6
FULL_EVERY = 10
GOAL_SHARE = 0.03


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--blocks", type=int, default=2, help="of each kind")
    options.add_argument("--steps", type=int, default=10, help="in a block; one checkpoint in each that publishes")
    given = options.parse_args()
    report = Report()
    size = replace(SIZES["5M"], batch=(4, 256)) if given.quick else replace(SIZES["100M"], batch=(2, 512))
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="headwater-publishing-") as folder, redis_in(Path(folder)) as client:
        build_llama(Path(folder) / "model", hidden=size.hidden, layers=size.layers, heads=size.heads)
        publisher = build_publisher(client, Path(folder) / "published", full_every=FULL_EVERY)
        loop = _open_loop(size, Path(folder), publisher)
        loop.run(given.blocks, given.steps)
        publisher.close()
        _note_loop(report, size, loop)
        _note_versions(report, size, publisher, num_steps=given.blocks * given.steps)
    report.figures["other load while measuring (1 min average)"] = os.getloadavg()[0]
    return report.finish(given.json)


@dataclass
class _Loop:
    """Seconds are kept by step."""

    policy: Policy
    optimizer: PolicyOptimizer
    batches: Iterator[Tensor]
    publisher: WeightPublisher
    checkpoints: Checkpoints
    step: int = 0
    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    """The same while publisher and checkpoint work."""
    publication_waits: list[float] = field(default_factory=list)
    checkpoint_waits: list[float] = field(default_factory=list)
    last_waits: list[float] = field(default_factory=list)
    """At the end of a block, until both threads are idle."""

    def run(self, num_blocks: int, num_steps: int) -> None:
        self._train()  # makes the moments
        self.publisher.publish(self.policy.model, self.step)
        for _ in range(num_blocks):
            self.alone += [_seconds(self._train) for _ in range(num_steps)]
            for number in range(1, num_steps + 1):
                self.beside.append(_seconds(self._train))
                self.publication_waits.append(_seconds(self._publish))
                if number == (num_steps + 1) // 2:
                    self.checkpoint_waits.append(_seconds(self._checkpoint))
            self.last_waits.append(_seconds(self._wait))

    def _train(self) -> None:
        """Next-token loss."""
        self.step, batch = self.step + 1, next(self.batches)
        self.optimizer.zero_grad()
        self.policy.model(input_ids=batch, labels=batch).loss.backward()
        self.optimizer.clip()
        self.optimizer.step(self.step)

    def _publish(self) -> None:
        if self.publisher.is_due(self.step):
            self.publisher.begin(self.policy.model, self.step)

    def _checkpoint(self) -> None:
        number, version = len(self.checkpoint_waits) + 1, self.publisher.version
        state = CheckpointState(number=number, after=0, step=self.step, weight_version=version, finished={})
        self.checkpoints.begin(state, self.policy, self.optimizer, then=self.checkpoints.prune)

    def _wait(self) -> None:
        self.publisher.wait()
        self.checkpoints.wait()


def _open_loop(size: Size, folder: Path, publisher: WeightPublisher) -> _Loop:
    rates = {"learning_rate": LEARNING_RATE, "warmup_steps": 0, "min_learning_rate_ratio": 1.0, "weight_decay": 0.0}
    trainer = TrainerSettings.model_validate({"device": "cpu", **rates})
    settings = Settings.model_validate({"policy": {"model": str(folder / "model")}, "trainer": trainer})
    ranks = Ranks.join("cpu", {})
    policy = load_policy(settings, None, with_reference=False, ranks=ranks)
    return _Loop(
        policy=policy,
        optimizer=PolicyOptimizer(policy.model, trainer),
        batches=training_batches(size, folder / "model"),
        publisher=publisher,
        checkpoints=Checkpoints(folder / "checkpoints", keep=1, ranks=ranks),
    )


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _note_loop(report: Report, size: Size, loop: _Loop) -> None:
    waits = sum(loop.publication_waits) + sum(loop.checkpoint_waits)
    alone, beside = statistics.median(loop.alone), statistics.median(loop.beside)
    figures = {
        "tokens a step": size.batch[0] * size.batch[1],
        "steps of each kind": len(loop.alone),
        "checkpoints": len(loop.checkpoint_waits),
        "step alone, s": alone,
        "step beside publisher and checkpoint, s": beside,
        "the latter takes longer, %": 100 * (beside / alone - 1),
        "wait for publication a step, ms": 1000 * statistics.median(loop.publication_waits),
        "longest wait for publication, ms": 1000 * max(loop.publication_waits),
        "longest wait for a checkpoint, ms": 1000 * max(loop.checkpoint_waits),
        "until both threads are idle after the last step, s": statistics.median(loop.last_waits),
    }
    report.figures |= {f"{size.name}: {name}": value for name, value in figures.items()}
    share = 100 * waits / (waits + sum(loop.beside))
    report.at_most(f"{size.name}: the step waits for both, % of the loop", share, 100 * GOAL_SHARE)


def _note_versions(report: Report, size: Size, publisher: WeightPublisher, *, num_steps: int) -> None:
    with transaction(publisher.run.database) as session:
        rows = [(row.form, row.num_bytes, row.seconds) for row in session.scalars(sa.select(WeightVersionRow))]
    report.at_least(f"{size.name}: versions published, % of steps", 100 * (len(rows) - 1) / num_steps, 100)
    for form in ("full", "sparse"):
        of_form = [(num_bytes, seconds) for found, num_bytes, seconds in rows if found == form]
        if of_form:
            num_bytes, seconds = zip(*of_form, strict=True)
            report.figures[f"{size.name}: {form}, MB"] = statistics.median(num_bytes) / 1e6
            report.figures[f"{size.name}: {form}, s in the background"] = statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
