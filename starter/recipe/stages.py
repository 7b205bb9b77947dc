"""The stages of the recipe. Each has a folder in the work folder; its `done.json` is written last.

policy ---------> base pool, checker drift --+
reader (shared trunk) -----------------------+-> judge_draft -> drift -> judge_second -> drift -> judge -> measure
       `-> rewriter
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from starter.model import WordCodec, build_llama, build_tokenizer, load_model, save_model
from starter.recipe.drift import Rewarder, TinyJudge, checker_rewards, draw_chunks, drift, roll_out
from starter.recipe.lessons import Group, Lessons
from starter.recipe.measure import heldout_chunks, measure_rewriter, measure_run
from starter.recipe.training import NUM_TAGS, Stage, fit
from starter.world import World

logger = logging.getLogger(__name__)

NUM_POLICY_LAYERS = 3
NUM_TEACHER_LAYERS = 4
SHIPPED = ("policy", "rewriter", "judge")
"""Stages whose models go to the out folder."""
STAGES = (
    *("policy", "reader", "base_pool", "checker_drift", "rewriter_draft", "rewriter", "judge_draft", "judge_drift"),
    *("judge_second", "judge_second_drift", "judge", "rewriter_figures", "judge_figures"),
)
"""In the order in which they run. Each is a method of `Workshop`."""


@dataclass(frozen=True)
class Budget:
    """Sizes of all stages; the defaults made the shipped models."""

    policy_steps: int = 1000
    reader_steps: int = 1200
    rewriter_draft_steps: int = 1500
    rewriter_steps: int = 500
    draft_steps: int = 700
    second_steps: int = 550
    judge_steps: int = 500
    pool_prefixes: int = 1200
    drift_steps: int = 70
    num_measured: int = 400

    def scaled(self, factor: float) -> "Budget":
        sizes = {name: max(2, round(value * factor)) for name, value in vars(self).items()}
        return Budget(**sizes | {"num_measured": max(20, sizes["num_measured"])})


class Workshop:
    """Runs the stages for one world. Finished stages are skipped; an interrupted training stage resumes."""

    def __init__(self, seed: int, *, work: Path, out: Path, budget: Budget, device: str = "cpu") -> None:
        self.world = World(seed)
        self.tokenizer = build_tokenizer(self.world)
        self.lessons = Lessons(self.world, WordCodec(self.tokenizer))
        self.work, self.out, self.budget, self.device = work, out, budget, device

    def run(self, name: str) -> None:
        """Run one stage unless its `done.json` exists."""
        folder = self.work / name
        if (folder / "done.json").is_file():
            logger.info("%s: already done", name)
            return
        folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        spent: float | None = getattr(self, name)(folder)
        seconds = round(spent or time.monotonic() - start, 1)
        (folder / "done.json").write_text(json.dumps({"seconds": seconds}), encoding="utf-8")
        logger.info("%s: done in %s s", name, seconds)

    def seconds(self) -> dict[str, float]:
        """Time spent on each finished stage."""
        files = {name: self.work / name / "done.json" for name in STAGES}
        return {name: json.loads(file.read_text("utf-8"))["seconds"] for name, file in files.items() if file.is_file()}

    def policy(self, folder: Path) -> float:
        """Next tokens on documents with all their defects."""
        model = build_llama(self.tokenizer, num_layers=NUM_POLICY_LAYERS, seed=self.world.seed + 1)
        stage = Stage("policy", self.budget.policy_steps, 2e-3, self.lessons.policy_rows, tag_weight=0.0)
        return self._fit(stage, folder, start=model)

    def reader(self, folder: Path) -> float:
        """The trunk of both teachers: it knows the facts and marks the first word of every fault."""
        model = build_llama(self.tokenizer, num_layers=NUM_TEACHER_LAYERS, seed=self.world.seed + 2)
        return self._fit(Stage("reader", self.budget.reader_steps, 2e-3, self.lessons.reader_rows), folder, start=model)

    def rewriter_draft(self, folder: Path) -> float:
        rows = partial(self.lessons.rewriter_rows, clean_rate=0.2)
        stage = Stage("rewriter_draft", self.budget.rewriter_draft_steps, 1.5e-3, rows, tag_weight=0.3)
        return self._fit(stage, folder, start="reader")

    def rewriter(self, folder: Path) -> float:
        """More copying at a lower rate: exact copies are learned last."""
        rows = partial(self.lessons.rewriter_rows, clean_rate=0.35, first=10**6)
        stage = Stage("rewriter", self.budget.rewriter_steps, 8e-4, rows, tag_weight=0.3)
        return self._fit(stage, folder, start="rewriter_draft")

    def base_pool(self, folder: Path) -> None:
        """Rollouts of the base policy on prefixes that only the judge sees."""
        chunks = draw_chunks(self.lessons, "judge-pool", self.budget.pool_prefixes, seed=0)
        save_groups(folder, roll_out(self._load("policy"), self.lessons, chunks, seed=0))

    def checker_drift(self, folder: Path) -> None:
        """Rollouts of policies trained by the checker, slowly and fast."""
        self._drift(folder, checker_rewards, rates=(3e-4, 6e-4))

    def judge_draft(self, folder: Path) -> float:
        rows = partial(self.lessons.judge_rows, pool=self._pool("base_pool", "checker_drift"), pool_rate=0.5)
        return self._fit(Stage("judge_draft", self.budget.draft_steps, 1.5e-3, rows), folder, start="reader")

    def judge_drift(self, folder: Path) -> None:
        """Rollouts of a policy trained by the draft judge: they show its blind spots."""
        self._drift(folder, TinyJudge(self._load("judge_draft"), self.lessons).rewards, rates=(5e-4,))

    def judge_second(self, folder: Path) -> float:
        pool = self._pool("base_pool", "checker_drift", "judge_drift", "judge_drift")
        rows = partial(self.lessons.judge_rows, pool=pool, pool_rate=0.65, first=10**6)
        return self._fit(Stage("judge_second", self.budget.second_steps, 1.5e-3, rows), folder, start="judge_draft")

    def judge_second_drift(self, folder: Path) -> None:
        """The remaining blind spots, found at two rates."""
        self._drift(folder, TinyJudge(self._load("judge_second"), self.lessons).rewards, rates=(3e-4, 5e-4))

    def judge(self, folder: Path) -> float:
        pool = self._pool("base_pool", "checker_drift", "judge_drift", *["judge_second_drift"] * 3)
        rows = partial(self.lessons.judge_rows, pool=pool, pool_rate=0.65, first=2 * 10**6)
        return self._fit(Stage("judge", self.budget.judge_steps, 1e-3, rows), folder, start="judge_second")

    def rewriter_figures(self, folder: Path) -> None:
        model = load_model(self.out / "rewriter", device=self.device)
        chunks = heldout_chunks(self.lessons, self.budget.num_measured)
        save_figures(folder, measure_rewriter(model, self.lessons, chunks))

    def judge_figures(self, folder: Path) -> None:
        """The judge on held-out data, including rollouts of a policy that it trained for 60 steps."""
        policy, model = (load_model(self.out / name, device=self.device) for name in ("policy", "judge"))
        num, num_steps = self.budget.num_measured, min(60, self.budget.drift_steps)
        judge = TinyJudge(model, self.lessons)
        save_figures(folder, measure_run(policy, judge, num=num, num_steps=num_steps))

    def figures(self) -> dict[str, float]:
        """Everything measured on the models in the out folder."""
        files = [self.work / name / "figures.json" for name in ("rewriter_figures", "judge_figures")]
        return {name: value for file in files for name, value in json.loads(file.read_text("utf-8")).items()}

    def _load(self, name: str) -> LlamaForCausalLM:
        return load_model(self.work / name / "model", device=self.device)

    def _fit(self, stage: Stage, folder: Path, *, start: LlamaForCausalLM | str) -> float:
        """Train a new model, or continue an earlier stage's model and tagger; return the seconds spent."""
        model = self._load(start) if isinstance(start, str) else start
        tagger = nn.Linear(model.config.hidden_size, NUM_TAGS)
        if isinstance(start, str):
            tagger.load_state_dict(load_file(self.work / start / "tagger.safetensors"))
        spent = fit(stage, model, tagger, folder=folder, device=self.device)
        model.to("cpu")  # type: ignore[arg-type]
        save_file(tagger.cpu().state_dict(), folder / "tagger.safetensors")
        for target in (folder / "model", *([self.out / stage.name] if stage.name in SHIPPED else [])):
            save_model(model, self.tokenizer, target)
        return spent

    def _drift(self, folder: Path, reward: Rewarder, *, rates: Sequence[float]) -> None:
        """Save the groups of one DPO run per learning rate."""
        kept: list[Group] = []
        for seed, lr in enumerate(rates, start=10):
            num_steps = self.budget.drift_steps
            steps = drift(self._load("policy"), self.lessons, reward, num_steps=num_steps, seed=seed, lr=lr)
            for step, _, groups in steps:
                kept += groups
                if step % 20 == 19:
                    logger.info("%s lr %s step %d: %s", folder.name, lr, step + 1, describe(groups))
        save_groups(folder, kept)

    def _pool(self, *names: str) -> list[Group]:
        """The groups of these stages, checked again."""
        files = [self.work / name / "groups.jsonl" for name in names]
        records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        return [self.lessons.group(record["prefix"], record["candidates"]) for record in records]


def save_groups(folder: Path, groups: Sequence[Group]) -> None:
    lines = [json.dumps({"prefix": g.prefix, "candidates": [c.ids for c in g.candidates]}) for g in groups]
    (folder / "groups.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_figures(folder: Path, figures: dict[str, float]) -> None:
    rounded = {name: round(value, 4) for name, value in figures.items()}
    (folder / "figures.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")


def describe(groups: list[Group]) -> str:
    """The checker's view of the rollouts in one line."""
    verdicts = [one.verdict for group in groups for one in group.candidates[2:]]
    if not verdicts:
        return "no rollouts"
    safe, clean = fmean(v.safe for v in verdicts), fmean(v.clean for v in verdicts)
    return f"safe {safe:.2f} clean {clean:.2f} facts {fmean(v.num_correct for v in verdicts):.2f}"
