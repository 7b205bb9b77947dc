"""Tables, plots and a Markdown report of what runs in the starter world achieved. For `headwater demo` and `sweep`."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from starter.evaluate import Continuation, Estimate, PolicyReport

TEACHER_NOTE = (
    "The starter's judge and rewriter are small language models whose training labels came from the world's own "
    "checker; the run itself never asks the checker, only this evaluation does."
)
MEASURES: dict[str, str] = {
    "safe": "safe", "safe_after_unsafe": "safe after an unsafe prefix", "no_fact_wrong": "no fact wrong",
    "facts_stated": "correct facts stated a suffix", "well_formed": "well-formed", "repetition": "with a repetition",
    "all_clean": "all clean", "win_rate": "win rate against the base",
}  # fmt: skip
Reports = Mapping[str, PolicyReport]
Interval = tuple[float, float | None]
"""A mean and the half width of its interval; None for a single seed."""


def table_rows(reports: Reports) -> list[list[str]]:
    """One row per measure: its name, then each policy's mean and 95 % interval. Shares in percent."""
    return [[label, *(_cell(name, getattr(one, name)) for one in reports.values())] for name, label in MEASURES.items()]


def estimates(report: PolicyReport) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every measure, as JSON."""
    return {name: asdict(getattr(report, name)) for name in MEASURES}


def side_by_side(reports: Reports, *, num: int) -> list[tuple[str, list[tuple[str, Continuation]]]]:
    """`num` prefixes spread evenly over the evaluation, each with the continuations by policy name."""
    first = next(iter(reports.values())).continuations
    picked = [index * len(first) // num for index in range(num)]
    return [(first[i].prefix.text, [(name, one.continuations[i]) for name, one in reports.items()]) for i in picked]


def describe(continuation: Continuation) -> str:
    """The checker's findings, such as "unsafe, wrong; 1 correct fact"."""
    verdict = continuation.verdict
    faults = [finding.kind for finding in verdict.findings if finding.kind != "correct"]
    facts = f"{verdict.num_correct} correct fact{'' if verdict.num_correct == 1 else 's'}"
    return f"{', '.join(faults) if faults else 'clean'}; {facts}"


def write_plots(folder: Path, reports: Reports, chosen_rollout_rate: Sequence[tuple[int, float]]) -> list[Path]:
    """`measures.png` and `chosen.png` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    bars: dict[str, dict[str, Interval]] = {}
    for policy, report in reports.items():
        found: dict[str, Estimate] = {name: getattr(report, name) for name in MEASURES if name != "facts_stated"}
        bars[policy] = {name: (one.mean, one.high - one.mean) for name, one in found.items()}
    return [plot_cells(folder / "measures.png", bars), _plot_chosen(folder / "chosen.png", chosen_rollout_rate)]


def write_markdown(path: Path, reports: Reports, plots: Sequence[Path], closing: Sequence[str]) -> None:
    """The whole report as one Markdown file next to its plots."""
    names = list(reports)
    lines = ["# What the starter run achieved", "", TEACHER_NOTE, ""]
    lines += [f"| measure | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(reports)]
    num = len(reports[names[0]].continuations)
    lines += ["", f"Percent of {num} held-out prefixes (half unsafe), T = 1; 95 % intervals in brackets.", ""]
    lines += [f"![{plot.stem}]({plot.name})" for plot in plots]
    for prefix, answers in side_by_side(reports, num=5):
        lines += ["", f"> …{prefix[-200:]}", ""]
        lines += [f"- **{name}**:{one.text} *({describe(one)})*" for name, one in answers]
    path.write_text("\n".join([*lines, "", *closing, ""]), encoding="utf-8")


def plot_cells(path: Path, cells: Mapping[str, Mapping[str, Interval]]) -> Path:
    """Bar chart of shares with their intervals: one group per measure, one bar per cell (or policy)."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes: Axes = figure.subplots()
    width = 0.8 / len(cells)
    measures = list(next(iter(cells.values())))
    for index, (name, shares) in enumerate(cells.items()):
        places = [place + index * width for place in range(len(measures))]
        means = [100 * mean for mean, _ in shares.values()]
        half_widths = [100 * (half or 0.0) for _, half in shares.values()]
        axes.bar(places, means, width, yerr=half_widths, capsize=2, label=name)
    centres = [place + width * (len(cells) - 1) / 2 for place in range(len(measures))]
    axes.set_xticks(centres, ["\n".join(textwrap.wrap(MEASURES[name], 16)) for name in measures])
    axes.set_ylabel("percent of held-out prefixes")
    return _save(figure, axes, path)


def plot_chosen_by_cell(path: Path, chosen: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Path:
    """How often a rollout was chosen in each cell: mean over seeds and the last ten steps.

    Omits cells whose objective always chooses the same kind.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Axes = figure.subplots()
    for cell, runs in chosen.items():
        if len({rate for run in runs for _, rate in run}) > 1:
            steps = [step for step, _ in min(runs, key=len)]
            means = [sum(run[index][1] for run in runs) / len(runs) for index in range(len(steps))]
            axes.plot(steps, _last_ten([100 * mean for mean in means]), label=cell)
    return _save_chosen(figure, axes, path)


def _plot_chosen(path: Path, rates: Sequence[tuple[int, float]]) -> Path:
    """Rates per step as dots, and their mean over the last ten steps as a line."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes: Axes = figure.subplots()
    steps, values = [step for step, _ in rates], [100 * rate for _, rate in rates]
    axes.plot(steps, values, ".", alpha=0.4, label="a step")
    axes.plot(steps, _last_ten(values), label="mean of the last ten")
    return _save_chosen(figure, axes, path)


def _save_chosen(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.set_xlabel("step")
    axes.set_ylabel("chosen candidate is a rollout, %")
    return _save(figure, axes, path)


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.set_ylim(0, 105)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    return path


def _last_ten(values: Sequence[float]) -> list[float]:
    return [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]


def _cell(name: str, estimate: Estimate) -> str:
    scale, digits = (1, 2) if name == "facts_stated" else (100, 1)
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"
