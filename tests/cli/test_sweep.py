"""The sweep: its file, its cells, its table. The runs themselves are the demo's."""

from pathlib import Path

import pytest

from cli.sweep import load_sweep, mean_and_half_width, t_quantile, table_lines
from shared.errors import SettingsError


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    sweep = load_sweep(
        written(tmp_path, 'seeds = [0]\n[grid]\n"trainer.objective" = ["dpo", "rf_nll"]\n"trainer.steps" = [5, 10]\n')
    )
    names = [cell.name for cell in sweep.all_cells()]
    assert names == [
        "objective=dpo, steps=5",
        "objective=dpo, steps=10",
        "objective=rf_nll, steps=5",
        "objective=rf_nll, steps=10",
    ]
    assert sweep.all_cells()[2].settings == {"trainer.objective": "rf_nll", "trainer.steps": 5}


def test_cells_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    sweep = load_sweep(written(tmp_path, 'seeds = [0]\n[[cells]]\nname = "a b"\n[[cells]]\nname = "a-b"\n'))
    with pytest.raises(SettingsError, match="differ as folder names"):
        sweep.all_cells()


def test_a_cell_may_have_seeds_of_its_own_and_a_seed_is_finished_before_the_next(tmp_path: Path) -> None:
    sweep = load_sweep(
        written(tmp_path, 'seeds = [0, 1]\n[[cells]]\nname = "a"\nseeds = [0, 1, 2]\n[[cells]]\nname = "b"\n')
    )
    assert [(seed, cell.name) for seed, cell in sweep.jobs()] == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a")]


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="sedes"):
        load_sweep(written(tmp_path, "sedes = [0]\n"))


def test_the_interval_is_students_over_seeds() -> None:
    # Three values 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
    mean, half_width = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("probability", "degrees", "tabled"),  # from a printed table of Student's t
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.975, 4, 2.776), (0.975, 9, 2.262),
     (0.975, 30, 2.042), (0.95, 5, 2.015), (0.995, 10, 3.169), (0.9, 120, 1.289)],
)  # fmt: skip
def test_quantiles_are_those_of_the_table(probability: float, degrees: int, tabled: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(tabled, abs=5e-4)


def test_one_seed_has_no_interval() -> None:
    assert mean_and_half_width([0.5]) == (0.5, None)


def test_the_table_has_the_base_and_every_cell() -> None:
    names = ["safe", "safe_after_unsafe", "no_fact_wrong", "well_formed", "repetition", "all_clean", "win_rate"]
    measures = {name: [0.5, 0.7] for name in [*names, "facts_stated"]}
    measures |= {f"base_{name}": [0.25, 0.25] for name in [*names, "facts_stated"]}

    lines = table_lines({"DPO": measures}, num_prefixes=10)
    assert lines[-2].startswith("| base | 2 | 25.0 ± 0.0 |")
    assert lines[-1].startswith("| DPO | 2 | 60.0 ± 127.1 |")  # t(0.975, 1) = 12.706, standard error 10
    assert lines[-1].endswith("| 0.60 ± 1.27 | - | - |")


def test_the_shipped_sweep_loads() -> None:
    sweep = load_sweep(Path("configs/sweeps/starter-orderings.toml"))
    assert len(sweep.all_cells()) == 9
    assert len(sweep.seeds) >= 3
