"""The report's pictures, drawn from step figures by matplotlib's file-only backend. Called by cli/report.py.

A picture whose figures a run does not have (margins of an NLL objective, rewards without a judge) is left out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from cli.report import StepRecord

_KIND_COLOURS = {"original": "#4c72b0", "rewrite": "#dd8452", "rollout": "#2f9e6e"}
_ROLE_COLOURS = {
    "rollout": "#2f9e6e",
    "rewrite": "#dd8452",
    "judge": "#8172b3",
    "wait": "#bbbbbb",
    "forward_backward": "#4c72b0",
    "optimizer": "#937860",
    "push": "#da8bc3",
    "checkpoint": "#ccb974",
}
_OTHER = "#444444"


@dataclass(frozen=True)
class Line:
    figure: str
    """Name in trainer/figures.py."""
    label: str
    colour: str = _OTHER
    kind: str = ""
    """The kind of candidate that it is about."""


@dataclass(frozen=True)
class Plot:
    """One picture: lines over steps, one axis."""

    file: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    share: bool = False
    """The axis runs from 0 to 1."""


PLOTS: tuple[Plot, ...] = (
    Plot("loss.png", "Loss", "loss", (Line("loss", "loss", "#4c72b0"),)),
    Plot(
        "reward.png",
        "Mean reward by kind of candidate",
        "reward in [0, 1]",
        tuple(Line(f"reward_{kind}", kind, colour) for kind, colour in _KIND_COLOURS.items()),
    ),
    Plot(
        "chosen.png",
        "Which kind is chosen (the rollout line is the paper's main plot)",
        "share of chosen suffixes",
        tuple(Line(f"chosen_{kind}_rate", kind, colour, kind) for kind, colour in _KIND_COLOURS.items()),
        share=True,
    ),
    Plot("margin.png", "Reward margin", "margin (nats x beta)", (Line("reward_margin", "margin", "#4c72b0"),)),
    Plot(
        "accuracy.png",
        "Pairs with a positive margin",
        "share of pairs",
        (Line("reward_accuracy", "accuracy", "#4c72b0"),),
        share=True,
    ),
    Plot(
        "lag.png",
        "Policy lag of the trained pairs",
        "weight versions",
        (Line("policy_lag_mean", "mean", "#4c72b0"), Line("policy_lag_max", "largest", "#c44e52")),
    ),
    Plot(
        "seconds.png",
        "Seconds a step by role",
        "seconds a step",
        tuple(Line(f"seconds_{role}", role.replace("_", " + "), colour) for role, colour in _ROLE_COLOURS.items()),
    ),
)


def write_plots(steps: "Sequence[StepRecord]", folder: Path, *, kinds: Collection[str]) -> list[Plot]:
    """Those that the run has figures for; files of earlier reports are replaced. `kinds`: the kinds of candidates
    that the run makes. The others' share of chosen suffixes is no news."""
    drawn = []
    for plot in PLOTS:
        lines = tuple(line for line in plot.lines if not line.kind or line.kind in kinds)
        figure = draw(replace(plot, lines=lines), steps)
        if figure is not None:
            figure.savefig(folder / plot.file, dpi=120)
            drawn.append(plot)
    return drawn


def draw(plot: Plot, steps: "Sequence[StepRecord]") -> Figure | None:
    """None if no step has any of the plot's figures."""
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


def _draw_line(axes: Any, line: Line, steps: "Sequence[StepRecord]") -> bool:
    """Each step pale, their running mean in full colour: the trend of a noisy figure is what is asked for."""
    points = [(step.step, step.figures[line.figure]) for step in steps if line.figure in step.figures]
    if not points:
        return False
    places, values = [place for place, _ in points], [value for _, value in points]
    if len(points) < len(steps) / 2:  # now and then, such as checkpoints
        axes.plot(places, values, color=line.colour, label=line.label, linestyle="", marker="o", markersize=4)
        return True
    width = max(1, len(values) // 10)
    if width == 1:
        axes.plot(places, values, color=line.colour, label=line.label, linewidth=1.6, marker="o", markersize=3)
        return True
    axes.plot(places, values, color=line.colour, alpha=0.25, linewidth=1)
    axes.plot(places, running_mean(values, width), color=line.colour, label=line.label, linewidth=1.8)
    return True


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of up to `width` values that end at each place."""
    return [
        sum(values[max(0, end - width) : end]) / len(values[max(0, end - width) : end])
        for end in range(1, len(values) + 1)
    ]
