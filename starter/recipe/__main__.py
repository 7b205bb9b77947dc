"""Makes the tokenizer, policy, rewriter and judge of a world: `python -m starter.recipe [--quick] [--seed N]`.

Finished stages are skipped and an interrupted one resumes, so the command can be stopped and rerun.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from starter.world import WORLD_VERSION

if TYPE_CHECKING:
    from starter.recipe.stages import Budget

STARTER = Path(__file__).parents[1]
QUICK_SCALE = 0.5


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    import torch

    from starter.recipe.stages import STAGES, Budget

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    work = options.work or STARTER / ".work" / f"{options.seed}{'-quick' if options.quick else ''}"
    budget = Budget().scaled(QUICK_SCALE) if options.quick else Budget()
    stages = options.only or STAGES
    make(options.out, seed=options.seed, work=work, budget=budget, stages=stages, device=options.device)


def make(
    out: Path, *, seed: int, work: Path, budget: "Budget", stages: Sequence[str], device: str = "cpu"
) -> dict[str, float]:
    """Run `stages`. Once all stages are done, write the figures to `measured.json` and return them, else {}."""
    from starter.recipe.stages import STAGES, Workshop

    workshop = Workshop(seed, work=work, out=out, budget=budget, device=device)
    for name in stages:
        workshop.run(name)
    seconds = workshop.seconds()
    if len(seconds) < len(STAGES):
        return {}
    figures = workshop.figures()
    record = {"world_version": WORLD_VERSION, "world_seed": seed, "budget": vars(budget), "seconds": seconds}
    (out / "measured.json").write_text(json.dumps(record | {"figures": figures}, indent=2) + "\n", encoding="utf-8")
    _print_table(figures)
    return figures


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m starter.recipe", description="Make the models of a world")
    parser.add_argument("--out", type=Path, default=STARTER / "models", help="folder for the models")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and rollouts (default: starter/.work/SEED)")
    parser.add_argument("--seed", type=int, default=0, help="which world")
    parser.add_argument("--quick", action="store_true", help="half of every budget")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="run only these stages")
    return parser


def _print_table(figures: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    from starter.recipe.measure import GOALS

    table = Table("figure", "measured", "goal", title="Figures on held-out documents, by the world's checker")
    for name, value in figures.items():
        goal = GOALS.get(name)
        mark = "" if goal is None else f">= {goal:.2f} {'met' if value >= goal else 'MISSED'}"
        table.add_row(name, f"{value:.4f}", mark)
    Console().print(table)


if __name__ == "__main__":
    main()
