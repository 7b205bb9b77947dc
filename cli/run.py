"""`headwater run`: a whole run on this machine, from its configuration to its last checkpoint.

    settings -> run folder (locked, identity compared) -> plan (ports, tokens) -> stack (processes) -> progress

The same command again resumes: every process finds its own place in the database, Redis and the checkpoints.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cli.display import Display, choose_display
from cli.plan import Plan, make_plan
from cli.ports import Ports
from cli.progress import ProgressReader
from cli.run_folder import RunFolder
from cli.stack import Stack
from cli.summary import summary_lines
from shared.configuration import load_settings, without_passwords, write_settings
from shared.coordination import Coordination, TrainerReport
from shared.errors import DatabaseError, HeadwaterError, StreamError
from shared.redis import connect
from shared.runs import Run, open_run

LOOK_EVERY_S = 1.0
COLLECTOR_END_S = 30.0
"""Documents in flight are given up by the collector once the trainer has finished."""


class Interruption:
    """Which signal asked the launcher to stop; a second one asks to stop at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.count = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.count += 1

    def asked(self) -> bool:
        return self.count > 0

    def hurried(self) -> bool:
        return self.count > 1

    @property
    def exit_code(self) -> int:
        return 128 + (self.signal or 0)


@contextmanager
def _signals_noted(interruption: Interruption) -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, interruption.note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(config: Path, overrides: Sequence[str]) -> int:
    """Exit code: 0 at the end of the run, 1 when a process failed, 128 + n when stopped by signal n."""
    settings = load_settings(config, overrides)
    folder = RunFolder(settings.run.folder)
    interruption = Interruption()
    with ExitStack() as held:
        held.enter_context(folder.locked())
        folder.create()
        folder.adopt(settings)
        plan = make_plan(settings, held.enter_context(Ports()))
        write_settings(without_passwords(plan.settings), folder.processes_file)
        opened = open_run(settings)
        held.callback(opened.close)
        held.enter_context(_signals_noted(interruption))
        Launcher(plan, folder, opened, choose_display(), interruption).run()
    if interruption.asked():
        return interruption.exit_code
    return 0


@dataclass
class Launcher:
    """One start of a run, from the first process to the summary."""

    plan: Plan
    folder: RunFolder
    records: Run
    display: Display
    interruption: Interruption

    def __post_init__(self) -> None:
        self._redis = connect(self.plan.redis_url, timeout_s=2.0)
        self._coordination = Coordination(self._redis, self.plan.settings.run.name)
        self._stack = Stack(
            self.plan,
            self.folder,
            tell=self._tell,
            interrupted=self.interruption.asked,
            has_reason_to_end=self._has_reason_to_end,
        )

    def run(self) -> None:
        """Start, watch until the trainer has finished, stop. Stops everything on any error, too."""
        with self.display:
            for note in self.plan.notes:
                self.display.say(note)
            self._run_to_the_end()
        self._summarise()

    def _run_to_the_end(self) -> None:
        try:
            self._start()
            self._watch()
        except HeadwaterError as exc:
            self._record("launcher", "failed", str(exc))
            raise
        finally:
            self._stack.stop(hurried=self.interruption.hurried)

    def _start(self) -> None:
        self._stack.start_redis()
        if not self.interruption.asked():
            self._reopen()
            self._stack.start_services()
        if not self.interruption.asked():
            self._stack.start_work()

    def _reopen(self) -> None:
        """What an earlier start of this run said about its end must not end this one, which has more steps to go."""
        report = self._coordination.trainer_report()
        if report and report.state == "finished" and report.step < self.plan.settings.trainer.steps:
            self._coordination.report_trainer(TrainerReport(report.step, report.weight_version, "training"))

    def _has_reason_to_end(self, role: str) -> bool:
        """No, when Redis or the database is away: the process is then started again and finds its work done."""
        try:
            report = self._coordination.trainer_report()
            if report is not None and report.state == "finished":
                return True
            documents = self.plan.settings.documents
            extent = self.records.extent(max_epochs=documents.max_epochs)
            return role == "collector" and self._coordination.source_exhausted(
                num_parts=documents.num_parts, extent=extent
            )
        except (StreamError, DatabaseError):
            return False

    def _watch(self) -> None:
        reader = self._reader()
        next_look = 0.0
        while not self.interruption.asked() and not self._stack.is_finished:
            self._stack.watch()
            if time.monotonic() >= next_look:
                self._show(reader)
                next_look = time.monotonic() + LOOK_EVERY_S
            time.sleep(0.1)
        if self._stack.is_finished:
            self._stack.wait_for_collector(timeout_s=COLLECTOR_END_S)
            self._show(reader)

    def _show(self, reader: ProgressReader) -> None:
        try:
            self.display.show(reader.look())
        except DatabaseError as exc:
            self.display.say(f"no progress to show: {exc}")

    def _reader(self) -> ProgressReader:
        settings = self.plan.settings
        return ProgressReader(
            self.records.database,
            settings.run.name,
            steps=settings.trainer.steps,
            client=self._redis,
            collector_url=self.plan.collector_url,
            token=self.plan.secrets.token,
        )

    def _tell(self, role: str, kind: str, message: str) -> None:
        """To the person, and to the events table where the database allows it."""
        self.display.say(message)
        self._record(role, kind, message)

    def _record(self, role: str, kind: str, message: str) -> None:
        try:
            self.records.record_event(role, kind, message)
        except DatabaseError as exc:
            self.display.say(f"this could not be written to the events table: {exc}")

    def _summarise(self) -> None:
        report = self._report()
        for line in summary_lines(self.records.database, self.plan.settings, self.folder):
            self.display.say(line)
        self.display.say(f"report: {report}")

    def _report(self) -> str:
        """A report that can't be made must not look like a failed run."""
        from cli.report import write_report

        try:
            return str(write_report(self.records.database, self.plan.settings, self.folder))
        except (HeadwaterError, OSError) as exc:
            return f"none ({exc})"
