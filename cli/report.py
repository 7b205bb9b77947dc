"""`headwater report`: Write plots (PNG) and a Markdown page into the run's report/ folder."""

import importlib.util
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import gmtime, strftime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from cli.audit import audit_run
from cli.progress import duration
from cli.report_chunks import comparison_lines
from cli.run_folder import RunFolder, RunName, find_run
from shared.checkpoint_state import newest_checkpoint
from shared.database import EventRow, StepRow, transaction
from shared.errors import HeadwaterError
from shared.runs import reading_run
from shared.secret_urls import without_secrets
from shared.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEWEST_EVENTS = 30
_KIND_COLOURS = {"original": "#4c72b0", "rewrite": "#dd8452", "rollout": "#2f9e6e"}
_SECONDS = (
    ("rollout", "rollout", "#2f9e6e"),
    ("rewrite", "rewrite", "#dd8452"),
    ("judge", "judge", "#8172b3"),
    ("forward_backward", "forward + backward", "#4c72b0"),
    ("optimizer", "optimizer", "#937860"),
    ("wait_windows", "wait for windows", "#bbbbbb"),
    ("wait_publish", "wait for publication", "#da8bc3"),
    ("wait_checkpoint", "wait for checkpoints", "#ccb974"),
    ("wait_ranks", "wait for other ranks", "#64b5cd"),
)
_ABOUT_PLOTS = """\
Pale: each step. Full: the mean of the last tenth of the steps. Seconds of rollout, rewrite and judge are
the collector's waits, summed over the step's documents; it waits for several documents at once."""
_BLUE, _RED = "#4c72b0", "#c44e52"


@dataclass(frozen=True)
class StepRecord:
    step: int
    at: float
    """Unix seconds."""
    figures: dict[str, float]


@dataclass(frozen=True)
class Line:
    figure: str
    """Name in trainer/figures.py."""
    label: str
    colour: str
    kind: str = ""
    """The kind of candidate it is about; empty for all."""


@dataclass(frozen=True)
class Plot:
    file: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    share: bool = False
    """The axis runs from 0 to 1."""


_OF_KIND = "Which kind is chosen (the rollout line is the paper's main plot)"
PLOTS = (
    Plot("loss.png", "Loss", "loss", (Line("loss", "loss", _BLUE),)),
    Plot("reward.png", "Mean reward by kind of candidate", "reward in [0, 1]",
         tuple(Line(f"reward_{kind}", kind, colour) for kind, colour in _KIND_COLOURS.items())),
    Plot("chosen.png", _OF_KIND, "share of chosen suffixes",
         tuple(Line(f"chosen_{kind}_rate", kind, colour, kind) for kind, colour in _KIND_COLOURS.items()), share=True),
    Plot("probes.png", "The judge on pairs whose better text is known", "share of pairs",
         (Line("judge_probe_accuracy", "original over spoiled", _BLUE),
          Line("judge_probe_human_over_base", "human over base policy", "#dd8452"),
          Line("judge_probe_unreadable", "no answer", "#bbbbbb")), share=True),
    Plot("margin.png", "Reward margin", "margin (nats x beta)", (Line("reward_margin", "margin", _BLUE),)),
    Plot("accuracy.png", "Pairs with a positive margin", "share of pairs",
         (Line("reward_accuracy", "accuracy", _BLUE),), share=True),
    Plot("lag.png", "Policy lag of the trained pairs", "optimizer steps",
         (Line("policy_lag_mean", "mean", _BLUE), Line("policy_lag_max", "largest", _RED))),
    Plot("seconds.png", "Seconds a step by role", "seconds a step",
         tuple(Line(f"seconds_{role}", label, colour) for role, label, colour in _SECONDS)),
    Plot("tokens.png", "Tokens a second", "tokens a second", (Line("tokens_per_second", "tokens", _BLUE),)),
)  # fmt: skip


def report(run: RunName) -> int:
    """Print the path of the page."""
    folder, settings = find_run(run)
    with reading_run(settings) as opened:
        path = write_report(opened.database, settings, folder)
    print(path)
    return 0


def write_report(database: sa.Engine, settings: Settings, folder: RunFolder) -> Path:
    """The path of the page. HeadwaterError when the run has no step yet, or without matplotlib."""
    require_matplotlib()
    steps = read_steps(database, settings.run.name)
    if not steps:
        raise HeadwaterError(f"run {settings.run.name} has taken no step yet: nothing to report")
    folder.report.mkdir(exist_ok=True)
    plots = write_plots(steps, folder.report, kinds=settings.kinds)
    lines = [f"# Run {settings.run.name}", "", *_facts(settings, folder, steps), ""]
    lines += ["## Figures", "", *_figure_table(steps), "", "## Plots", "", _ABOUT_PLOTS, ""]
    lines += [*(f"![{plot.title}]({plot.file})\n" for plot in plots)]
    lines += ["## Audit", "", *_audit_lines(database, settings, folder), ""]
    lines += ["## Comparisons of the newest recorded chunks", "", *comparison_lines(database, settings.run.name), ""]
    lines += ["## Events", "", *_event_lines(database, settings.run.name)]
    path = folder.report / "report.md"
    path.write_text(without_secrets("\n".join(lines)) + "\n", encoding="utf-8")
    return path


def read_steps(database: sa.Engine, run_id: str) -> list[StepRecord]:
    query = sa.select(StepRow).where(StepRow.run_id == run_id).order_by(StepRow.step)
    with transaction(database) as session:
        return [StepRecord(row.step, row.at, _finite(row.figures)) for row in session.scalars(query)]


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def _facts(settings: Settings, folder: RunFolder, steps: Sequence[StepRecord]) -> list[str]:
    newest = newest_checkpoint(folder.checkpoints)
    return [
        f"- objective `{settings.trainer.objective}`, policy `{settings.policy.model}`",
        f"- documents `{settings.documents.path}` ({settings.documents.format})",
        f"- step {steps[-1].step} of {settings.trainer.steps}, "
        f"{duration(steps[-1].at - steps[0].at)} between the first and the last",
        f"- newest checkpoint: {f'`{newest[1]}`' if newest else 'none yet'}",
    ]


def _figure_table(steps: Sequence[StepRecord]) -> list[str]:
    """The first and the last tenth of the steps: single steps are noisy."""
    tenth = max(1, len(steps) // 10)
    first, last = _means(steps[:tenth]), _means(steps[-tenth:])
    lines = [f"| figure | mean of the first {tenth} steps | mean of the last {tenth} |", "|---|---:|---:|"]
    shown = [{name: f"{value:.4g}" for name, value in means.items()} for means in (first, last)]
    names = sorted(first.keys() | last.keys())
    return lines + [f"| {name} | {shown[0].get(name, '')} | {shown[1].get(name, '')} |" for name in names]


def _means(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Mean of each figure over the steps that have it."""
    names = {name for step in steps for name in step.figures}
    return {name: fmean(step.figures[name] for step in steps if name in step.figures) for name in names}


def _audit_lines(database: sa.Engine, settings: Settings, folder: RunFolder) -> list[str]:
    result = audit_run(database, settings, folder)
    lines = [f"{result.equation}.", ""]
    if result.balance.dropped:
        dropped = sorted(result.balance.dropped.items())
        lines += ["| dropped because | windows |", "|---|---:|", *[f"| {reason} | {n} |" for reason, n in dropped], ""]
    return lines + [f"- {check.name}: **{check.outcome}** ({check.detail})" for check in result.checks]


def _event_lines(database: sa.Engine, run_id: str) -> list[str]:
    query = sa.select(EventRow).where(EventRow.run_id == run_id).order_by(EventRow.id.desc()).limit(_NEWEST_EVENTS)
    with transaction(database) as session:
        rows = [(row.at, row.role, row.kind, row.message) for row in session.scalars(query)]
    if not rows:
        return ["None."]
    lines = ["| time (UTC) | role | kind | what |", "|---|---|---|---|"]
    for at, role, kind, message in reversed(rows):
        text = " ".join(message.split()).replace("|", "\\|")[:300]
        lines.append(f"| {strftime('%Y-%m-%d %H:%M:%S', gmtime(at))} | {role} | {kind} | {text} |")
    return lines


def require_matplotlib() -> None:
    """HeadwaterError if plots cannot be drawn; call it before hours of work that end in a plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise HeadwaterError("the plots need matplotlib: pip install 'headwater[report]'")


def write_plots(steps: Sequence[StepRecord], folder: Path, *, kinds: Collection[str]) -> list[Plot]:
    """The plots that the run has figures for; files of earlier reports are replaced. `kinds` are those that the run
    makes: a line about another kind is left out."""
    drawn = []
    for plot in PLOTS:
        lines = tuple(line for line in plot.lines if not line.kind or line.kind in kinds)
        figure = draw(replace(plot, lines=lines), steps)
        if figure is not None:
            figure.savefig(folder / plot.file, dpi=120)
            drawn.append(plot)
    return drawn


def draw(plot: Plot, steps: Sequence[StepRecord]) -> "Figure | None":
    """None if no step has any of the plot's figures (an NLL objective has no margins)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    num_lines = sum(_draw_line(axes, line, steps) for line in plot.lines)
    if not num_lines:
        return None
    axes.set_title(plot.title, loc="left", fontsize=12)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plot.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if plot.share:
        axes.set_ylim(-0.03, 1.03)
    if num_lines > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _draw_line(axes: Any, line: Line, steps: Sequence[StepRecord]) -> bool:
    """Each step pale, the running mean in full colour: figures are noisy, their trend matters."""
    points = [(step.step, step.figures[line.figure]) for step in steps if line.figure in step.figures]
    if not points:
        return False
    places, values = [place for place, _ in points], [value for _, value in points]
    if len(points) < len(steps) / 2:  # not at every step, such as checkpoints
        axes.plot(places, values, color=line.colour, label=line.label, linestyle="", marker="o", markersize=4)
    elif (width := len(values) // 10) <= 1:
        axes.plot(places, values, color=line.colour, label=line.label, linewidth=1.6, marker="o", markersize=3)
    else:
        axes.plot(places, values, color=line.colour, alpha=0.25, linewidth=1)
        axes.plot(places, running_mean(values, width), color=line.colour, label=line.label, linewidth=1.8)
    return True


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """At each place, the mean of the last `width` values."""
    return [fmean(values[max(0, end - width) : end]) for end in range(1, len(values) + 1)]
