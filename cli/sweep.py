"""`headwater sweep`: Run a grid of settings over several seeds in the starter world, or resume it; ends with a table.

    seeds = [0, 1, 2]
    num_prefixes = 400
    [settings]                              # for every cell
    "trainer.steps" = 60
    [grid]                                  # the product of these lists ...
    "trainer.objective" = ["dpo", "rf_nll"]
    [[cells]]                               # ... and/or cells by hand
    name = "sft on one rollout"
    settings = { "trainer.objective" = "sft_rollout" }
    seeds = [0, 1, 2, 3, 4]                 # instead of the sweep's

Each cell and seed is an ordinary run in `OUT/CELL/seed-N`, which the world's checker evaluates into its
`evaluation.json`. Runs that have this file are done: a sweep that was stopped resumes with the others.
"""

import itertools
import json
import math
import re
import statistics
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console

from cli.demo import MODELS, STARTER, ask_checker, chosen_rollout_rates, world_documents, world_of, world_options
from cli.report import require_matplotlib
from cli.run import run
from shared.checkpoint_state import newest_policy
from shared.errors import SettingsError

PLOTTED = ("safe", "no_fact_wrong", "well_formed", "all_clean", "win_rate")


class Cell(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    settings: dict[str, Any] = {}
    seeds: list[int] = []
    """Empty: the sweep's."""

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-") or "cell"


class Sweep(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    seeds: list[int] = Field(min_length=1)
    num_prefixes: int = Field(default=400, ge=2)
    num_documents: int = Field(default=4000, ge=1)
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    cells: list[Cell] = []

    def all_cells(self) -> list[Cell]:
        """The cells by hand, then the product of the grid, named by their settings."""
        made = list(self.cells)
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            chosen = dict(zip(self.grid, values, strict=True))
            name = ", ".join(f"{key.rpartition('.')[2]}={_plain(value)}" for key, value in chosen.items())
            made.append(Cell(name=name, settings=chosen))
        folders = [cell.folder for cell in made]
        if not made or len(set(folders)) != len(folders):
            raise SettingsError("a sweep needs at least one cell, and cells need names that differ as folder names")
        return made

    def seeds_of(self, cell: Cell) -> list[int]:
        return cell.seeds or self.seeds

    def jobs(self) -> list[tuple[int, Cell]]:
        """Every (seed, cell), seed by seed, so that a stopped sweep has all cells of some seeds."""
        cells = self.all_cells()
        seeds = dict.fromkeys(seed for cell in cells for seed in self.seeds_of(cell))
        return [(seed, cell) for seed in seeds for cell in cells if seed in self.seeds_of(cell)]


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its 95 % t-interval; None for one seed."""
    if len(values) < 2:
        return statistics.fmean(values), None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), t_quantile(0.975, len(values) - 1) * spread


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t: the value that is not exceeded with `probability` (above 0.5), by halving an angle.

    For whole degrees of freedom n, P(|T| < t) is a finite sum over the angle atan(t / sqrt(n)), Abramowitz & Stegun
    26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        is_below = _within(angle, degrees) < 2 * probability - 1
        low, high = (angle, high) if is_below else (low, angle)
    return math.tan(low) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(n) tan(angle)) for n degrees of freedom."""
    is_odd = degrees % 2
    term, total = (math.cos(angle) if is_odd else 1.0), 0.0
    for k in range(1 + is_odd, degrees, 2):  # n even: 1 + cos^2 / 2 + ...; n odd: cos + cos^3 * 2 / 3 + ...
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if is_odd else total


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file of the sweep.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder of its runs [runs/NAME, the file's name].")] = None,
) -> int:
    """Run what is missing, then write `sweep.md` and `sweep.json`."""
    return run_sweep(load_sweep(file), out or Path("runs") / file.stem)


def run_sweep(plan: Sweep, out: Path) -> int:
    require_matplotlib()
    console = Console()
    documents_file = out / "documents.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    world_documents(world_of(MODELS), documents_file, plan.num_documents)
    cells = plan.all_cells()
    for seed, cell in plan.jobs():
        folder = out / cell.folder / f"seed-{seed}"
        if (folder / "evaluation.json").exists():
            continue
        console.rule(f"{cell.name}, seed {seed}")
        code = run(STARTER / "demo.toml", _options(plan, cell, seed, folder, documents_file))
        if code != 0:
            return code
        _evaluate(folder, plan.num_prefixes, seed)
    _write_table(cells, plan, out, console)
    return 0


def load_sweep(file: Path) -> Sweep:
    """SettingsError names a wrong key."""
    try:
        return Sweep.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as exc:
        raise SettingsError(f"no sweep file at {file}") from exc
    except (tomllib.TOMLDecodeError, ValidationError) as exc:
        raise SettingsError(f"{file} is not a sweep: {exc}") from exc


def _options(plan: Sweep, cell: Cell, seed: int, folder: Path, documents_file: Path) -> list[str]:
    words = world_options(documents_file)
    words += ["--run.name", folder.name, "--run.directory", str(folder.parent), "--run.seed", str(seed)]
    settings = plan.settings | cell.settings
    return words + [word for name, value in settings.items() for word in (f"--{name}", _plain(value))]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _evaluate(folder: Path, num_prefixes: int, seed: int) -> None:
    from starter.exhibit import MEASURES

    world = world_of(MODELS)
    base = ask_checker(MODELS / "policy", world, num_prefixes=num_prefixes, seed=seed)
    trained = ask_checker(newest_policy(folder), world, num_prefixes=num_prefixes, seed=seed, base=base)
    measures = {name: getattr(trained, name).mean for name in MEASURES}
    measures |= {f"base_{name}": getattr(base, name).mean for name in MEASURES}
    rates = [rate for _, rate in chosen_rollout_rates(folder)]
    third = max(1, len(rates) // 3)
    if rates:
        measures["chosen_rollout_rate_first_third"] = statistics.fmean(rates[:third])
        measures["chosen_rollout_rate_last_third"] = statistics.fmean(rates[-third:])
    temporary = folder / "evaluation.json.tmp"
    temporary.write_text(json.dumps(measures, indent=2), encoding="utf-8")
    temporary.replace(folder / "evaluation.json")


def _write_table(cells: list[Cell], plan: Sweep, out: Path, console: Console) -> None:
    from starter.exhibit import plot_cells, plot_chosen_by_cell

    results: dict[str, dict[str, list[float]]] = {}
    chosen: dict[str, list[list[tuple[int, float]]]] = {}
    for cell in cells:
        folders = [out / cell.folder / f"seed-{seed}" for seed in plan.seeds_of(cell)]
        found = [json.loads((folder / "evaluation.json").read_text(encoding="utf-8")) for folder in folders]
        results[cell.name] = {name: [one[name] for one in found if name in one] for name in found[0]}
        chosen[cell.name] = [rates for folder in folders if (rates := chosen_rollout_rates(folder))]
    (out / "sweep.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    means = {
        name: {measure: mean_and_half_width(found[measure]) for measure in PLOTTED if measure in found}
        for name, found in results.items()
    }
    plots = [plot_cells(out / "sweep.png", means), plot_chosen_by_cell(out / "chosen.png", chosen)]
    lines = table_lines(results, num_prefixes=plan.num_prefixes)
    lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in plots)]
    (out / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"\n{out / 'sweep.md'}, {out / 'sweep.json'}")


def table_lines(results: dict[str, dict[str, list[float]]], *, num_prefixes: int) -> list[str]:
    """A Markdown table with a row for each cell: `mean ± half width of the 95 % t-interval over seeds`."""
    shares = ["safe", "safe_after_unsafe", "no_fact_wrong", "well_formed", "repetition", "all_clean", "win_rate"]
    rates = ["chosen_rollout_rate_first_third", "chosen_rollout_rate_last_third"]
    names = [*shares, "facts_stated", *rates]
    lines = [f"Percent of {num_prefixes} held-out prefixes a seed, T = 1; facts stated: correct ones a suffix.", ""]
    header = " | ".join(name.replace("_", " ") for name in names)
    lines += [f"| cell | seeds | {header} |", f"|{'---|' * (len(names) + 2)}"]
    base = max(results.values(), key=lambda measures: len(measures["safe"]))
    lines.append(_row("base", {name: base.get(f"base_{name}", []) for name in names}))
    return lines + [_row(cell, {name: measures.get(name, []) for name in names}) for cell, measures in results.items()]


def _row(cell: str, measures: dict[str, list[float]]) -> str:
    return f"| {cell} | {len(measures['safe'])} | {' | '.join(_cell(*of) for of in measures.items())} |"


def _cell(name: str, values: list[float]) -> str:
    if not values:
        return "-"
    scale, digits = (1, 2) if name == "facts_stated" else (100, 1)
    mean, half_width = mean_and_half_width([scale * value for value in values])
    return f"{mean:.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")
