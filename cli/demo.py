"""`headwater demo`: the whole stack in the starter world, then the world's checker says what improved.

    documents of the world -> an online-DPO run, and beside it a next-token run (the baseline) -> evaluation -> report

Both runs are ordinary run folders under `runs/demo`, made by `headwater run` with starter/demo.toml; what is
finished there is not made again, so an interrupted demo goes on where it was.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from sqlalchemy import select

import starter
from cli.processes import Child, stop_children
from cli.run import run
from cli.run_folder import find_run
from shared.checkpoint_state import newest_policy
from shared.database import StepRow, open_database, transaction
from shared.errors import HeadwaterError
from starter.documents import documents, write_documents
from starter.world import World

if TYPE_CHECKING:
    from starter.evaluate import PolicyReport

STARTER = Path(starter.__file__).parent
MODELS, PROMPTS = STARTER / "models", STARTER / "prompts"


BASELINE_TIMEOUT_S = 600.0
BASELINE_STOP_S = 30.0


@dataclass(frozen=True)
class Size:
    """How much a demo does."""

    steps: int
    num_prefixes: int
    num_documents: int


FULL = Size(steps=60, num_prefixes=400, num_documents=4000)
QUICK = Size(steps=12, num_prefixes=100, num_documents=1000)


def demo(size: Size, *, directory: Path, seed: int = 0, models: Path = MODELS) -> int:
    """Exit code of the first part that fails, else 0. `models`: what `starter.recipe` made, of whichever world."""
    world = world_of(models)
    console = Console()
    directory.mkdir(parents=True, exist_ok=True)
    documents_file = directory / "documents.jsonl"
    world_documents(world, documents_file, size.num_documents)
    settings = [
        *world_options(documents_file, models), "--run.directory", str(directory), "--run.seed", str(seed),
        "--trainer.steps", str(size.steps),
    ]  # fmt: skip
    config = STARTER / "demo.toml"
    console.rule(f"online DPO: {size.steps} steps")
    baseline = _start_baseline(config, [*settings, *BASELINE], log=directory / "next-token.log")
    console.print(f"The baseline, next-token training on as many documents, runs beside it (log: {baseline.log}).")
    try:
        code = run(config, [*settings, "--run.name", "online-dpo"]) or _finish(baseline)
    finally:
        stop_children([baseline], timeout_s=BASELINE_STOP_S, hurried=lambda: False)
    if code == 0:
        _evaluate(directory, size, console, world=world, models=models)
    return code


def _start_baseline(config: Path, options: Sequence[str], *, log: Path) -> Child:
    child = Child(
        "next-token", [sys.executable, "-m", "cli.main", "run", str(config), *options], log=log, environ=os.environ
    )
    child.start()
    return child


def _finish(baseline: Child) -> int:
    """Wait for the baseline's end; its exit code. HeadwaterError where it takes far longer than the run beside it."""
    deadline = time.monotonic() + BASELINE_TIMEOUT_S
    while (code := baseline.exit_code) is None:
        if time.monotonic() > deadline:
            raise HeadwaterError(f"the next-token run does not end: its log is {baseline.log}")
        time.sleep(0.1)
    if code != 0:
        raise HeadwaterError(f"the next-token run failed ({code}): " + " | ".join(baseline.tail(lines=3)))
    return 0


def world_of(models: Path) -> World:
    """The world that models were made in; HeadwaterError where the folder doesn't say."""
    file = models / "measured.json"
    try:
        return World(int(json.loads(file.read_text(encoding="utf-8"))["world_seed"]))
    except (OSError, ValueError, KeyError) as exc:
        raise HeadwaterError(
            f"{file} does not name a world ({exc}): make models with python -m starter.recipe"
        ) from exc


BASELINE = (
    "--run.name", "next-token", "--trainer.objective", "next_token",
    "--collector.schedule", json.dumps([{"kinds": ["original"], "num_rollouts": 0}]),
)  # fmt: skip


def world_options(documents_file: Path, models: Path = MODELS) -> list[str]:
    """Settings that place the starter's models, prompts and documents; the same for every run in the world."""
    options = {
        "policy.model": models / "policy",
        "rewriter.engine.model": models / "rewriter",
        "judge.engine.model": models / "judge",
        "rewriter.prompt": PROMPTS / "rewriter.txt",
        "judge.criteria.quality.prompt": PROMPTS / "quality.txt",
        "judge.criteria.safety.prompt": PROMPTS / "safety.txt",
        "judge.criteria.factuality.prompt": PROMPTS / "factuality.txt",
        "documents.path": documents_file,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def chosen_rollout_rates(run_folder: Path) -> list[tuple[int, float]]:
    """(step, share of chosen candidates that are rollouts) of a run."""
    _, settings = find_run(str(run_folder))
    engine = open_database(settings.database_url)
    with transaction(engine) as session:
        rows = session.execute(
            select(StepRow.step, StepRow.figures).where(StepRow.run_id == settings.run.name).order_by(StepRow.step)
        ).all()
    return [(step, figures["chosen_rollout_rate"]) for step, figures in rows if "chosen_rollout_rate" in figures]


def ask_checker(
    policy_folder: Path, world: World, *, num_prefixes: int, seed: int = 0, base: "PolicyReport | None" = None
) -> "PolicyReport":
    """The checker's report on a policy's continuations of held-out prefixes; `base`: whom its win rate is against."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from starter.evaluate import evaluate_policy

    return evaluate_policy(
        LlamaForCausalLM.from_pretrained(policy_folder),
        PreTrainedTokenizerFast.from_pretrained(policy_folder),
        world,
        num_prefixes=num_prefixes,
        seed=seed,
        baseline=base.continuations if base else None,
    )


def world_documents(world: World, path: Path, num: int) -> None:
    """The first `num` training documents of the world, if the file isn't there yet."""
    if not path.exists():
        write_documents(path, documents(world, num))


def _evaluate(directory: Path, size: Size, console: Console, *, world: World, models: Path) -> None:
    from starter.exhibit import TEACHER_NOTE, estimates, write_markdown, write_plots

    console.rule(f"evaluation: {size.num_prefixes} held-out prefixes, half of them unsafe, T = 1")
    folders = {
        "base": models / "policy",
        "next token": newest_policy(directory / "next-token"),
        "online DPO": newest_policy(directory / "online-dpo"),
    }
    reports: dict[str, PolicyReport] = {}
    for name, folder in folders.items():
        reports[name] = ask_checker(folder, world, num_prefixes=size.num_prefixes, base=reports.get("base"))
    rates = chosen_rollout_rates(directory / "online-dpo")
    report_folder = directory / "report"
    plots = write_plots(report_folder, reports, rates)
    closing = _closing(directory, folders["online DPO"])
    write_markdown(report_folder / "report.md", reports, plots, closing)
    measured = {name: estimates(report) for name, report in reports.items()}
    (report_folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    _show(console, reports, rates)
    console.print(TEACHER_NOTE, style="dim")
    for line in closing:
        console.print(line, soft_wrap=True)


def _show(console: Console, reports: "dict[str, PolicyReport]", rates: list[tuple[int, float]]) -> None:
    from starter.exhibit import describe, side_by_side, table_rows

    table = Table("%", *reports, title="What the world's checker says (95 % intervals)")
    for row in table_rows(reports):
        table.add_row(*row)
    console.print(table)
    for prefix, answers in side_by_side(reports, num=5):
        console.print(f"\n…{prefix[-160:]}", style="bold", highlight=False, markup=False)
        for name, one in answers:
            console.print(f"  {name:>10}:{one.text}", highlight=False, markup=False)
            console.print(f"{'':>12}({describe(one)})", style="dim", markup=False)
    console.print("\nShare of chosen candidates that are rollouts, by step:")
    for begin in range(0, len(rates), 10):
        part = rates[begin : begin + 10]
        mean = sum(rate for _, rate in part) / len(part)
        console.print(f"  steps {part[0][0]:>3}-{part[-1][0]:<3} {100 * mean:5.1f} %  {'█' * round(40 * mean)}")


def _closing(directory: Path, policy: Path) -> list[str]:
    return [
        f"The trained policy: {policy} (AutoModelForCausalLM.from_pretrained loads it).",
        f"Plots and report: {directory / 'report' / 'report.md'}; conservation: headwater audit "
        f"{directory / 'online-dpo'}.",
        "Next, your own documents: see 'Your own documents' in README.md.",
    ]
