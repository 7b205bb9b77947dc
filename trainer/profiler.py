"""A window of steps under torch's profiler: `trainer.profile_steps = [20, 25]`. Held by the loop.

    with StepProfiler(settings.trainer.profile_steps, folder=settings.run.folder / "profile") as profiler:
        while ...:
            profiler.step(step)     # before step `step` begins

The trace is `profile/step-00000020-00000025.json.gz`, for https://ui.perfetto.dev or chrome://tracing. A run that ends
inside the window leaves the steps up to there. A trace that can't be written costs a line in the log, never the run.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_log = logging.getLogger(__name__)


class StepProfiler:
    def __init__(self, steps: tuple[int, int] | None, *, folder: Path) -> None:
        """`steps`: the first and the last; None records nothing."""
        self._steps = steps
        self._folder = folder
        self._profile: profile | None = None
        self._recorded = (0, 0)
        """First and newest step in the profile."""
        self._range = ExitStack()
        """The step's own range in the trace."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._write()

    def step(self, step: int) -> None:
        """Called before step `step` begins; a skipped step is announced twice."""
        self._range.close()
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self._write()
        elif step >= first:
            if self._profile is None:
                self._begin(step)
            self._recorded = (self._recorded[0], step)
            self._range.enter_context(record_function(f"step {step}"))

    def _begin(self, step: int) -> None:
        """A run that resumes inside the window records the rest of it."""
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._recorded = (step, step)

    def _write(self) -> None:
        self._range.close()
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        path = self._folder / "step-{:08d}-{:08d}.json.gz".format(*self._recorded)
        try:
            finished.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as exc:
            _log.error("no trace of steps %d to %d, %s can't be written: %s", *self._recorded, path, exc)
        else:
            _log.info("the trace of steps %d to %d is %s: open it in https://ui.perfetto.dev", *self._recorded, path)
