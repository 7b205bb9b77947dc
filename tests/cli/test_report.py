"""The report: pictures of what a run has, numbers in a table, nothing invented."""

import struct
from pathlib import Path

import pytest

from cli.report import PLOTS, StepRecord, report, running_mean, write_plots, write_report
from shared.errors import HeadwaterError
from tests.cli.conftest import MadeRun, key


def _png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return int(width), int(height)


def test_a_report_has_the_pictures_that_the_run_has_figures_for(made: MadeRun) -> None:
    for step in range(1, 21):
        made.step(step, loss=0.7 / step, chosen_rollout_rate=step / 20, seconds_judge=1.0)
    text = write_report(made.engine, made.settings, made.folder).read_text()
    assert {path.name for path in made.folder.report.glob("*.png")} == {"loss.png", "chosen.png", "seconds.png"}
    assert "![Loss](loss.png)" in text
    assert "margin.png" not in text
    assert _png_size(made.folder.report / "loss.png") == (960, 504)


def test_a_kind_that_never_wins_is_drawn_and_one_that_is_never_made_is_not(made: MadeRun) -> None:
    steps = [StepRecord(n, 0.0, {"chosen_rollout_rate": 0.0, "chosen_rewrite_rate": 0.0}) for n in (1, 2)]
    (chosen,) = [plot for plot in PLOTS if plot.file == "chosen.png"]
    assert write_plots(steps, made.folder.report, kinds={"rollout"}) == [chosen]
    assert write_plots(steps, made.folder.report, kinds={"original"}) == []


def test_the_table_holds_the_first_and_last_tenth_of_what_is_finite(made: MadeRun) -> None:
    for step in range(1, 21):
        made.step(step, loss=float(step), kl=float("inf"))
    text = write_report(made.engine, made.settings, made.folder).read_text()
    assert "| loss | 1.5 | 19.5 |" in text
    assert "| kl |" not in text


def test_drops_audit_and_events_stand_in_the_page(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    made.step(1, loss=1.0)
    made.read(key(0))
    made.ledger.drop(key(0), reason="not_json")
    made.run.record_event("judge", "died", "judge was killed | by signal 9")
    assert report(str(made.folder.path)) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert "| not_json | 1 |" in text
    assert "1 windows read = 0 trained + 1 dropped + 0 in flight" in text
    assert "| judge | died | judge was killed \\| by signal 9 |" in text


def test_a_run_without_a_step_has_nothing_to_report(made: MadeRun) -> None:
    with pytest.raises(HeadwaterError, match="no step yet"):
        write_report(made.engine, made.settings, made.folder)


def test_every_picture_draws_figures_that_the_trainer_names() -> None:
    from trainer.figures import FIGURES

    assert {line.figure for plot in PLOTS for line in plot.lines} <= FIGURES.keys()


def test_a_running_mean_ends_at_each_place() -> None:
    assert running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
