"""Claim: a tournament chooses as well as all pairs with a fifth of the sampled calls, or a tenth of graded ones.

    python -m benchmarks.tournament [--quick] [--json FILE] [--plot FILE]

Simulated candidates and judges (benchmarks/tournament_worlds.py); the schedules are the product's own. The figure is
the share of choice: (utility of chosen - utility of rejected) / (highest - lowest), mean over chunks. All schedules
play the same chunks. Each learns the judge's temper while it plays, from a start that suits none of the judges.
`A / B` divides two such shares.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads would count as CPU seconds

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.report import Report, parser
from benchmarks.tournament_worlds import Entrant, Outcome, Setting, play

TOURNAMENT, ALL_PAIRS = Entrant("tournament"), Entrant("all_pairs")
SHARPNESSES = (1.0, 2.0, 4.0)
GRADED = ((1.0, 0.5), (1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (4.0, 0.5))
"""Sharpness and whim; a goal holds where the whim is not larger."""
SAMPLED_GOAL, GRADED_GOAL, SHARE_GOAL = 153, 77, 0.97
OTHERS = (
    Setting("bias 1", bias=1.0),
    Setting("bias 2, k = 1", sharpness=1.0, bias=2.0),
    Setting("heavy tails", shape="heavy"),
    Setting("near-ties", shape="near_ties"),
    Setting("intransitive", intransitivity=0.5),
    Setting("k = 0.5", sharpness=0.5),
    Setting("k = 8", sharpness=8.0),
    Setting("one verdict in five is a coin flip", lapses=0.2),
    Setting("three texts and their near copies", shape="clusters"),
    *(Setting(f"{size} candidates", num_candidates=size) for size in (4, 8, 12, 24, 32)),
    Setting("graded, whim 1, bias 1", whim=1.0, bias=1.0),
    Setting("graded, whim 1, heavy tails", whim=1.0, shape="heavy"),
    Setting("graded, whim 1, near-ties", whim=1.0, shape="near_ties"),
    Setting("graded, whim 1, intransitive", whim=1.0, intransitivity=0.5),
    *(Setting(f"graded, whim 1, {size} candidates", whim=1.0, num_candidates=size) for size in (4, 8, 32)),
)
BUDGETS, GRADED_BUDGETS = (36, 63, 85, 117, 153, 230), (18, 27, 36, 54, 77, 120)
Task = tuple[Setting, Entrant, int]


def main() -> int:
    made = parser(__doc__ or "")
    made.add_argument("--plot", type=Path, help="draw calls against choice into this file; needs matplotlib")
    given = made.parse_args()
    report = Report({"chunks: main settings": _num_chunks(given)[0], "chunks: all others": _num_chunks(given)[1]})
    outcomes = _play_all(_tasks(given))
    _note_goals(report, outcomes)
    _note_others(report, outcomes)
    if given.plot:
        _plot(outcomes, given.plot)
    return report.finish(given.json)


def _sampled(sharpness: float) -> Setting:
    return Setting(f"k = {sharpness:g}", sharpness=sharpness)


def _graded(sharpness: float, whim: float) -> Setting:
    return Setting(f"graded, k = {sharpness:g}, whim {whim:g}", sharpness=sharpness, whim=whim)


def _peers(setting: Setting) -> tuple[Entrant, Entrant, Entrant]:
    """All pairs, the pivot, and a tournament that may spend what the pivot spends."""
    samples = 5 if setting.whim is None else 2  # a graded verdict asked for again is the same
    calls = (setting.num_candidates - 1) * samples
    return Entrant("all_pairs", samples=samples), Entrant("pivot", samples=samples), Entrant("tournament", budget=calls)


def _num_chunks(given: argparse.Namespace) -> tuple[int, int]:
    """At the settings of the goals (graded ones: half of it), and at all the others."""
    return (100, 30) if given.quick else (600, 100)


def _tasks(given: argparse.Namespace) -> list[Task]:
    many, few = _num_chunks(given)
    tasks: list[Task] = []
    for sharpness in SHARPNESSES:
        tasks += [(_sampled(sharpness), entrant, many) for entrant in (TOURNAMENT, ALL_PAIRS)]
        tasks += [(_sampled(sharpness), entrant, few) for entrant in _curve(_sampled(sharpness))]
    for judge in GRADED:
        tasks += [(_graded(*judge), TOURNAMENT, many // 2)]
        tasks += [(_graded(*judge), entrant, few) for entrant in _curve(_graded(*judge))]
    for setting in OTHERS:
        tasks += [(setting, entrant, few) for entrant in (TOURNAMENT, *_peers(setting))]
    return list(dict.fromkeys(tasks))


def _curve(setting: Setting) -> list[Entrant]:
    if setting.whim is not None:
        return [*(Entrant("tournament", budget=calls) for calls in GRADED_BUDGETS), Entrant("all_pairs", samples=2)]
    return [
        *(Entrant("tournament", budget=calls) for calls in BUDGETS),
        *(Entrant("all_pairs", samples=samples) for samples in (1, 2, 3)),
        *(Entrant("pivot", samples=samples) for samples in (1, 3, 5, 9)),
        *(Entrant("swiss", budget=calls) for calls in BUDGETS),
    ]


def _play_all(tasks: list[Task]) -> dict[tuple[str, Entrant], Outcome]:
    """The long ones first."""
    tasks = sorted(tasks, key=lambda task: -task[2])
    with ProcessPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(_play, tasks))
    return {(task[0].name, task[1]): outcome for task, outcome in zip(tasks, outcomes, strict=True)}


def _play(task: Task) -> Outcome:
    setting, entrant, num_chunks = task
    return play(setting, entrant, num_chunks=num_chunks, clock=time.process_time)


Outcomes = dict[tuple[str, Entrant], Outcome]


def _note_goals(report: Report, outcomes: Outcomes) -> None:
    for sharpness in SHARPNESSES:
        name = _sampled(sharpness).name
        full = outcomes[name, ALL_PAIRS]
        report.figures[f"{name}: share, all pairs (765 calls)"] = full.share
        _note(report, name, outcomes[name, TOURNAMENT], full=full, most=SAMPLED_GOAL)
    for sharpness, whim in GRADED:
        full = outcomes[_sampled(sharpness).name, ALL_PAIRS]
        name = _graded(sharpness, whim).name
        _note(report, name, outcomes[name, TOURNAMENT], full=full, most=GRADED_GOAL)


def _note(report: Report, name: str, found: Outcome, *, full: Outcome, most: int) -> None:
    report.figures[f"{name}: share, tournament"] = found.share
    report.figures[f"{name}: share it expected"] = found.expected_share
    report.figures[f"{name}: standard error of its share"] = found.error
    report.at_least(f"{name}: tournament / 765 sampled calls", found.share / full.share, SHARE_GOAL)
    report.at_most(f"{name}: most calls", found.most_calls, most)
    report.figures[f"{name}: mean calls"] = found.calls
    report.figures[f"{name}: mean rounds"] = found.rounds
    report.at_most(f"{name}: most rounds", found.most_rounds, 8)
    report.figures[f"{name}: CPU ms a chunk"] = found.cpu_ms


def _note_others(report: Report, outcomes: Outcomes) -> None:
    leads = []
    for setting in (*OTHERS, *map(_sampled, SHARPNESSES)):
        all_pairs, pivot, at_pivot = _peers(setting)
        leads.append(outcomes[setting.name, at_pivot].share - outcomes[setting.name, pivot].share)
        for entrant in (TOURNAMENT, all_pairs, pivot, at_pivot) if setting in OTHERS else ():
            outcome, budget = outcomes[setting.name, entrant], f" of {entrant.budget}" if entrant.budget else ""
            report.figures[f"{setting.name}: share, {entrant.name}{budget} ({outcome.calls:.0f} calls)"] = outcome.share
    report.at_least("least lead over the pivot at equal calls", min(leads), 0.0)
    most = {size: outcomes[f"{size} candidates", TOURNAMENT].most_calls / size for size in (8, 32)}
    report.at_most("calls a candidate, of 32 / of 8", most[32] / most[8], 1.1)


def _plot(outcomes: Outcomes, path: Path) -> None:
    """Left to right: sampled verdicts by sharpness, then graded ones. Calls on a log scale, with what was spent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    labels = {"tournament": "tournament", "all_pairs": "all pairs", "swiss": "Swiss", "pivot": "pivot"}
    for axes, sharpness in zip(panels, SHARPNESSES, strict=False):
        setting = _sampled(sharpness)
        for name, label in labels.items():
            chosen = [entrant for entrant in (*_curve(setting), ALL_PAIRS) if entrant.name == name]
            _line(axes, [outcomes[setting.name, entrant] for entrant in chosen], label)
        axes.set_title(f"sampled, k = {sharpness:g}")
        axes.axhline(SHARE_GOAL * outcomes[setting.name, ALL_PAIRS].share, color="grey", linewidth=0.8, linestyle=":")
    for judge in GRADED:
        graded = _graded(*judge)
        found = [outcomes[graded.name, entrant] for entrant in _curve(graded) if entrant.name == "tournament"]
        _line(panels[3], found, f"k = {judge[0]:g}, whim {judge[1]:g}")
    panels[3].set_title("graded, tournament")
    panels[0].set_ylabel("share of the best choice")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks([20, 50, 100, 200, 500], labels=["20", "50", "100", "200", "500"])
        axes.minorticks_off()
        axes.set(xlabel="calls a chunk of 18", ylim=(0.75 if axes is panels[3] else 0.4, 1.01))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def _line(axes: object, found: list[Outcome], label: str) -> None:
    ordered = sorted(found, key=lambda outcome: outcome.calls)
    axes.plot(  # type: ignore[attr-defined]
        [outcome.calls for outcome in ordered], [outcome.share for outcome in ordered], "o-", markersize=3, label=label
    )


if __name__ == "__main__":
    sys.exit(main())
