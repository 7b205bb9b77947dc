"""`headwater demo`: Train the shipped tiny models in the starter world, then let its checker say what improved.

    documents of the world -> an online-DPO run, with a next-token run (the baseline) beside it -> evaluation -> report

Both are ordinary runs of starter/demo.toml in folders under `runs/demo`; an interrupted demo resumes there.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import starter
from cli.processes import Child, stop_children
from cli.report import read_steps, require_matplotlib
from cli.run import run
from cli.run_folder import find_run
from shared.checkpoint_state import newest_policy
from shared.errors import HeadwaterError
from shared.runs import reading_run
from starter.documents import documents, write_documents
from starter.world import World

if TYPE_CHECKING:
    from starter.evaluate import PolicyReport

STARTER = Path(starter.__file__).parent
MODELS, PROMPTS = STARTER / "models", STARTER / "prompts"
BASELINE_TIMEOUT_S = 600.0
BASELINE_STOP_S = 30.0
BASELINE = (
    "--run.name", "next-token", "--trainer.objective", "next_token",
    "--collector.schedule", json.dumps([{"kinds": ["original"], "num_rollouts": 0}]),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    steps: int
    num_prefixes: int
    num_documents: int


FULL = Size(steps=60, num_prefixes=400, num_documents=4000)
QUICK = Size(steps=12, num_prefixes=100, num_documents=1000)


def demo(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and prefixes: one minute.")] = False,
    directory: Annotated[Path | None, typer.Option(help="Folder of the runs [runs/demo or runs/demo-quick].")] = None,
    seed: int = 0,
    models: Annotated[Path, typer.Option(help="Models of python -m starter.recipe.", show_default=False)] = MODELS,
) -> int:
    """Exit code of the first part that fails, else 0."""
    folder = directory or Path("runs/demo-quick" if quick else "runs/demo")
    return run_demo(QUICK if quick else FULL, directory=folder, seed=seed, models=models)


def run_demo(size: Size, *, directory: Path, seed: int = 0, models: Path = MODELS) -> int:
    require_matplotlib()
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
    command = [sys.executable, "-m", "cli.main", "run", str(config), *settings, *BASELINE]
    baseline = Child("next-token", command, log=directory / "next-token.log", environ=os.environ)
    baseline.start()
    console.print(f"The baseline, next-token training on as many documents, runs beside it (log: {baseline.log}).")
    try:
        code = run(config, [*settings, "--run.name", "online-dpo"]) or _finish(baseline)
    finally:
        stop_children([baseline], timeout_s=BASELINE_STOP_S)
    if code == 0:
        _evaluate(directory, size, console, world=world, models=models)
    return code


def _finish(baseline: Child) -> int:
    """Wait for the baseline; 0. HeadwaterError if it failed, or takes far longer than the run beside it."""
    deadline = time.monotonic() + BASELINE_TIMEOUT_S
    while (code := baseline.exit_code) is None:
        if time.monotonic() > deadline:
            raise HeadwaterError(f"the next-token run does not end; its log is {baseline.log}")
        time.sleep(0.1)
    if code != 0:
        raise HeadwaterError(f"the next-token run failed ({code}): " + " | ".join(baseline.tail(lines=3)))
    return 0


def world_of(models: Path) -> World:
    """The world that the models were made for. HeadwaterError if the folder does not say."""
    file = models / "measured.json"
    try:
        return World(int(json.loads(file.read_text(encoding="utf-8"))["world_seed"]))
    except (OSError, ValueError, KeyError) as exc:
        raise HeadwaterError(
            f"{file} does not name a world ({exc}): make models with python -m starter.recipe"
        ) from exc


def world_options(documents_file: Path, models: Path = MODELS) -> list[str]:
    """The starter's models, prompts and documents as overrides, the same for every run in the world."""
    options = {
        "policy.model": models / "policy",
        "rewriter.engine.model": models / "rewriter",
        "judge.engine.model": models / "judge",
        "rewriter.prompt": PROMPTS / "rewriter.txt",
        **{f"judge.criteria.{name}.prompt": PROMPTS / f"{name}.txt" for name in ("quality", "safety", "factuality")},
        "documents.path": documents_file,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def chosen_rollout_rates(run_folder: Path) -> list[tuple[int, float]]:
    """A run's (step, share of chosen candidates that are rollouts)."""
    _, settings = find_run(str(run_folder))
    with reading_run(settings) as found:
        steps = read_steps(found.database, found.name)
    name = "chosen_rollout_rate"
    return [(one.step, one.figures[name]) for one in steps if name in one.figures]


def ask_checker(
    policy_folder: Path, world: World, *, num_prefixes: int, seed: int = 0, base: "PolicyReport | None" = None
) -> "PolicyReport":
    """The checker's report on a policy's continuations of held-out prefixes; its win rate is against `base`."""
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
    """Write the world's first `num` training documents, unless the file exists."""
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
    closing = [
        f"The trained policy: {folders['online DPO']} (AutoModelForCausalLM.from_pretrained loads it).",
        f"Plots and report: {report_folder / 'report.md'}; conservation: headwater audit {directory / 'online-dpo'}.",
        "Next, your own documents: see 'Run it on your documents' in README.md.",
    ]
    write_markdown(report_folder / "report.md", reports, plots, closing)
    measured = {name: estimates(report) for name, report in reports.items()}
    (report_folder / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    _show(console, reports, rates)
    console.print(TEACHER_NOTE, style="dim")
    console.print(*closing, sep="\n", soft_wrap=True)


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
