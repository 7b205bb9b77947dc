"""Claim: on real text, online DPO against a teacher's likelihood beats next-token training on the same documents.

    python -m benchmarks.real_text --documents articles.jsonl [--quick] [--json FILE]

All training goes through `headwater run`, as a user's would: the teacher and the base policy by next-token
prediction on the first half of the documents, then from that base, on the other half, online DPO (K = 4, judge
`likelihood`) and next-token training on the same documents, chunks and number of updates. The last documents are
held out; their prefixes are continued by each policy at T = 1 and scored by the teacher.
Every stage is a run folder under --work; what is there already is not made again.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report, parser
from evaluation.likelihood import LikelihoodResult, held_out_prefixes, teacher_log_prob
from shared.checkpoint_state import newest_policy

PREFIX_TOKENS, NEW_TOKENS = 128, 64


@dataclass(frozen=True)
class Size:
    """How long each stage trains."""

    teacher_steps: int
    base_steps: int
    steps: int
    num_prefixes: int


FULL = Size(teacher_steps=100, base_steps=30, steps=60, num_prefixes=128)
QUICK = Size(teacher_steps=40, base_steps=20, steps=20, num_prefixes=48)


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--documents", type=Path, required=True, help="JSONL with `text`")
    options.add_argument("--work", type=Path, help="folder of the runs (runs/real-text, or runs/real-text-quick)")
    given = options.parse_args()
    size = QUICK if given.quick else FULL
    stages = Stages(given.work or Path("runs/real-text-quick" if given.quick else "runs/real-text"), size)
    stages.split(given.documents)
    stages.train()
    report = Report()
    results = stages.evaluate()
    for name, result in results.items():
        report.figures[f"{name}: teacher log-prob per token"] = result.mean_log_prob
        report.figures[f"{name}: 95 % half width"] = result.half_width
        report.figures[f"{name}: distinct 4-grams"] = result.distinct_4
    report.figures |= {f"seconds: {name}": seconds for name, seconds in stages.seconds.items()}
    gain = results["online DPO"].mean_log_prob - results["next token"].mean_log_prob
    noise = results["online DPO"].half_width + results["next token"].half_width
    report.figures["sum of the half widths"] = noise
    report.at_least("online DPO over next token, nats per token", gain, noise)
    return report.finish(given.json)


class Stages:
    """The folders and commands of the recipe."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder, size
        self.seconds: dict[str, float] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def split(self, documents: Path) -> None:
        """First half: teacher and base. Second half: the run, but its last tenth of all is held out."""
        lines = documents.read_text(encoding="utf-8").splitlines()
        half, held_out = len(lines) // 2, len(lines) - max(1, len(lines) // 10)
        for name, part in (
            ("first-half", lines[:half]),
            ("second-half", lines[half:held_out]),
            ("held-out", lines[held_out:]),
        ):
            self._jsonl(name).write_text("\n".join(part) + "\n", encoding="utf-8")

    def train(self) -> None:
        first, second = self._jsonl("first-half"), self._jsonl("second-half")
        scratch = self.folder / "scratch"
        if not (scratch / "config.json").exists():
            self._headwater(
                "init-model", "--documents", str(first), "--out", str(scratch), "--vocab-size", "2048",
                "--hidden-size", "256", "--num-layers", "4", "--num-heads", "4", "--context", "512",
            )  # fmt: skip
        for name, steps in (("teacher", self.size.teacher_steps), ("base", self.size.base_steps)):
            self._run(name, "configs/real-text-pretrain.toml", model=scratch, documents=first, steps=steps)
        base, teacher = newest_policy(self.folder / "base"), newest_policy(self.folder / "teacher")
        judge = ("--judge.engine.model", str(teacher))
        self._run("online-dpo", "configs/real-text.toml", *judge, model=base, documents=second, steps=self.size.steps)
        baseline = (
            "--trainer.objective", "next_token",
            "--collector.schedule", json.dumps([{"kinds": ["original"], "num_rollouts": 0}]),
        )  # fmt: skip
        self._run(
            "next-token", "configs/real-text.toml", *baseline, model=base, documents=second, steps=self.size.steps
        )

    def evaluate(self) -> dict[str, LikelihoodResult]:
        prefixes = held_out_prefixes(
            self._jsonl("held-out"),
            self.folder / "scratch",
            num_prefixes=self.size.num_prefixes,
            prefix_tokens=PREFIX_TOKENS,
        )
        folders = {"base": "base", "next token": "next-token", "online DPO": "online-dpo"}
        return {
            name: teacher_log_prob(
                newest_policy(self.folder / run),
                newest_policy(self.folder / "teacher"),
                prefixes,
                new_tokens=NEW_TOKENS,
                seed=0,
            )
            for name, run in folders.items()
        }

    def _run(self, name: str, config: str, *options: str, model: Path, documents: Path, steps: int) -> None:
        began = time.monotonic()
        self._headwater(
            "run", config, "--run.name", name, "--run.directory", str(self.folder), "--policy.model", str(model),
            "--documents.path", str(documents), "--trainer.steps", str(steps), *options,
        )  # fmt: skip
        self.seconds[name] = time.monotonic() - began

    def _headwater(self, *words: str) -> None:
        print("headwater", *words, flush=True)
        subprocess.run([sys.executable, "-m", "cli.main", *words], check=True)

    def _jsonl(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
