import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.profiler import StepProfiler


def take_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profiler.step(step)
        torch.ones(8, 8) @ torch.ones(8, 8)


def events_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def names_in(path: Path) -> list[str]:
    return [event["name"] for event in events_of(path) if "name" in event]


def steps_in(path: Path) -> set[str]:
    return {name for name in names_in(path) if name.startswith("step ")}


def test_the_trace_has_the_operations_of_the_window_and_of_no_other_step(tmp_path: Path) -> None:
    with StepProfiler((2, 3), folder=tmp_path / "profile") as profiler:
        take_steps(profiler, 1, 3)
        assert not list(tmp_path.iterdir())
        take_steps(profiler, 4, 5)
        [path] = (tmp_path / "profile").iterdir()
    assert path.name == "step-00000002-00000003.json.gz"
    assert steps_in(path) == {"step 2", "step 3"}
    assert names_in(path).count("aten::mm") == 2
    assert [path] == list((tmp_path / "profile").iterdir())


def fail_after(profiler: StepProfiler, step: int) -> None:
    with profiler:
        take_steps(profiler, 1, step)
        raise KeyError


def test_a_run_that_ends_inside_the_window_leaves_the_steps_up_to_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        fail_after(StepProfiler((2, 9), folder=tmp_path), 4)
    assert steps_in(tmp_path / "step-00000002-00000004.json.gz") == {"step 2", "step 3", "step 4"}


def test_a_run_that_resumes_inside_the_window_records_the_rest(tmp_path: Path) -> None:
    with StepProfiler((2, 6), folder=tmp_path) as profiler:
        take_steps(profiler, 5, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005-00000006.json.gz"]


def test_nothing_is_recorded_outside_the_window_or_without_one(tmp_path: Path) -> None:
    for steps in (None, (7, 9)):
        with StepProfiler(steps, folder=tmp_path) as profiler:
            take_steps(profiler, 1, 3)
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be", encoding="utf-8")
    with caplog.at_level(logging.ERROR), StepProfiler((1, 1), folder=tmp_path / "profile") as profiler:
        take_steps(profiler, 1, 2)
    assert "no trace of steps 1 to 1" in caplog.text
