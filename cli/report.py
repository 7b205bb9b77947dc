"""`headwater report`: plots and a Markdown page of one run, into its report/ folder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import gmtime, strftime

import sqlalchemy as sa
from sqlalchemy import Engine

from cli.audit import audit_run, balance_line
from cli.display import duration
from cli.run_folder import RunFolder, find_run
from shared.checkpoint_state import newest_checkpoint
from shared.database import EventRow, StepRow, transaction
from shared.errors import HeadwaterError
from shared.runs import reading_run
from shared.secret_urls import without_secrets
from shared.settings import Settings

_NEWEST_EVENTS = 30


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as the database has it."""

    step: int
    at: float
    """Unix seconds."""
    figures: dict[str, float]


def report(run: str) -> int:
    """Write the report and say where it lies."""
    folder, settings = find_run(run)
    with reading_run(settings) as opened:
        path = write_report(opened.database, settings, folder)
    print(path)
    return 0


def write_report(engine: Engine, settings: Settings, folder: RunFolder) -> Path:
    """The page's path. Raises HeadwaterError when the run has no step yet."""
    steps = read_steps(engine, settings.run.name)
    if not steps:
        raise HeadwaterError(f"run {settings.run.name} has taken no step yet: nothing to report")
    from cli.plots import write_plots

    folder.report.mkdir(exist_ok=True)
    plots = write_plots(steps, folder.report, kinds=settings.kinds)
    lines = [
        f"# Run {settings.run.name}",
        "",
        *_facts(engine, settings, folder, steps),
        "",
        "## Figures",
        "",
        *_figure_table(steps),
        "",
        "## Plots",
        "",
        "Pale: each step. Full: the mean of the last tenth of the steps. Seconds of rollout, rewrite and judge are",
        "the collector's waits, summed over the step's documents; it waits for several documents at once.",
        "",
        *[f"![{plot.title}]({plot.file})\n" for plot in plots],
        "## Audit",
        "",
        *_audit_lines(engine, settings, folder),
        "",
        "## Events",
        "",
        *_event_lines(engine, settings.run.name),
    ]
    path = folder.report / "report.md"
    path.write_text(without_secrets("\n".join(lines)) + "\n", encoding="utf-8")
    return path


def read_steps(engine: Engine, run_id: str) -> list[StepRecord]:
    """Ascending."""
    query = sa.select(StepRow).where(StepRow.run_id == run_id).order_by(StepRow.step)
    with transaction(engine) as session:
        return [StepRecord(row.step, row.at, _finite(row.figures)) for row in session.scalars(query)]


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _facts(engine: Engine, settings: Settings, folder: RunFolder, steps: Sequence[StepRecord]) -> list[str]:
    newest = newest_checkpoint(folder.checkpoints)
    return [
        f"- objective `{settings.trainer.objective}`, policy `{settings.policy.model}`",
        f"- documents `{settings.documents.path}` ({settings.documents.format})",
        f"- step {steps[-1].step} of {settings.trainer.steps}, "
        f"{duration(steps[-1].at - steps[0].at)} between the first and the last",
        f"- newest checkpoint: {f'`{newest[1]}`' if newest else 'none yet'}",
    ]


def _figure_table(steps: Sequence[StepRecord]) -> list[str]:
    """First tenth against last tenth, so that one noisy step does not speak for the run."""
    tenth = max(1, len(steps) // 10)
    first, last = _means(steps[:tenth]), _means(steps[-tenth:])
    lines = [f"| figure | mean of the first {tenth} steps | mean of the last {tenth} |", "|---|---:|---:|"]
    for name in sorted(first.keys() | last.keys()):
        lines.append(f"| {name} | {_number(first.get(name))} | {_number(last.get(name))} |")
    return lines


def _means(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Of each figure over the steps that have it."""
    names = {name for step in steps for name in step.figures}
    values = {name: [step.figures[name] for step in steps if name in step.figures] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _audit_lines(engine: Engine, settings: Settings, folder: RunFolder) -> list[str]:
    result = audit_run(engine, settings, folder)
    lines = [f"{balance_line(result)}.", ""]
    if result.balance.dropped:
        dropped = sorted(result.balance.dropped.items())
        lines += ["| dropped because | windows |", "|---|---:|", *[f"| {reason} | {n} |" for reason, n in dropped], ""]
    return lines + [f"- {check.name}: **{check.outcome}** ({check.detail})" for check in result.checks]


def _event_lines(engine: Engine, run_id: str) -> list[str]:
    query = sa.select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.id.desc()).limit(_NEWEST_EVENTS)
    with transaction(engine) as session:
        rows = [(row.at, row.role, row.kind, row.message) for row in session.scalars(query)]
    if not rows:
        return ["None."]
    lines = ["| time (UTC) | role | kind | what |", "|---|---|---|---|"]
    for at, role, kind, message in reversed(rows):
        text = " ".join(message.split()).replace("|", "\\|")[:300]
        lines.append(f"| {strftime('%Y-%m-%d %H:%M:%S', gmtime(at))} | {role} | {kind} | {text} |")
    return lines
