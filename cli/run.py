"""`headwater run`: Start Redis, services, collector and trainer on this machine and run to trainer.steps, or resume.

    settings -> run folder (lock, compare identity) -> plan (ports, tokens) -> stack (processes) -> progress

The same command resumes a run: every process finds where it was in the database, Redis and the checkpoints.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

from cli.audit import AuditResult, audit_run
from cli.plan import Plan, Ports, make_plan
from cli.progress import Display, ProgressReader, choose_display
from cli.run_folder import ConfigFile, Overrides, RunFolder
from cli.stack import Stack
from shared.checkpoint_state import newest_checkpoint
from shared.configuration import load_settings, without_passwords, write_settings
from shared.coordination import Coordination, TrainerReport
from shared.errors import DatabaseError, HeadwaterError, StreamError
from shared.redis import connect
from shared.runs import Run, open_run

LOOK_EVERY_S = 1.0
COLLECTOR_END_S = 30.0
"""Once the trainer has finished, the collector gives up what is in flight."""


class Interruption:
    """The signal that asked the launcher to stop. A second one means: at once."""

    signal: int | None = None
    count = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.count += 1

    def asked(self) -> bool:
        return self.count > 0

    def hurried(self) -> bool:
        return self.count > 1

    @contextmanager
    def noting_signals(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
            numbers.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self.note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def run(config: ConfigFile, overrides: Overrides) -> int:
    """0 at the end of the run, 128 + n when stopped by signal n. HeadwaterError when a process failed."""
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
        held.enter_context(interruption.noting_signals())
        Launcher(plan, folder, opened, choose_display(), interruption).run()
    return 0 if interruption.signal is None else 128 + interruption.signal


@dataclass
class Launcher:
    """One start of a run, from its first process to the summary."""

    plan: Plan
    folder: RunFolder
    records: Run
    display: Display
    interruption: Interruption

    def __post_init__(self) -> None:
        self._redis = connect(self.plan.redis_url, timeout_s=2.0)
        self._coordination = Coordination(self._redis, self.plan.settings.run.name)
        self._stack = Stack(
            self.plan, self.folder, tell=self._tell, interrupted=self.interruption.asked, has_ended=self._has_ended
        )

    def run(self) -> None:
        """Start, watch until the trainer has finished, then stop. Errors stop everything too."""
        with self.display:
            for note in self.plan.notes:
                self.display.say(note)
            try:
                self._start()
                self._watch()
            except HeadwaterError as exc:
                self._record("launcher", "failed", str(exc))
                raise
            finally:
                self._stack.stop(hurried=self.interruption.hurried)
        report = self._report()
        for line in [*self._summary(), f"report: {report}"]:
            self.display.say(line)

    def _start(self) -> None:
        self._stack.start_redis()
        if not self.interruption.asked():
            self._reopen()
            self._stack.start_services()
        if not self.interruption.asked():
            self._stack.start_work()

    def _reopen(self) -> None:
        """Withdraw the `finished` of an earlier start: this one has more steps to go."""
        report = self._coordination.trainer_report()
        if report and report.state == "finished" and report.step < self.plan.settings.trainer.steps:
            self._coordination.report_trainer(TrainerReport(report.step, report.weight_version, "training"))

    def _has_ended(self, role: str) -> bool:
        """Whether trainer or collector has done its work. False while Redis or the database is down: the process is
        restarted and finds out."""
        documents = self.plan.settings.documents
        try:
            report = self._coordination.trainer_report()
            if report is not None and report.state == "finished":
                return True
            if role != "collector":
                return False
            extent = self.records.extent(max_epochs=documents.max_epochs)
            return self._coordination.source_exhausted(num_parts=documents.num_parts, extent=extent)
        except (StreamError, DatabaseError):
            return False

    def _watch(self) -> None:
        reader = ProgressReader(self.records, self.plan, self._redis)
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

    def _tell(self, role: str, kind: str, message: str) -> None:
        """Show it, and write it to the events table."""
        self.display.say(message)
        self._record(role, kind, message)

    def _record(self, role: str, kind: str, message: str) -> None:
        try:
            self.records.record_event(role, kind, message)
        except DatabaseError as exc:
            self.display.say(f"the events table does not have this: {exc}")

    def _report(self) -> str:
        """A report that cannot be written must not look like a failed run."""
        from cli.report import write_report

        try:
            return str(write_report(self.records.database, self.plan.settings, self.folder))
        except (HeadwaterError, OSError) as exc:
            return f"none ({exc})"

    def _summary(self) -> list[str]:
        """Steps, documents, the audit's verdict and the newest checkpoint, once the processes have stopped."""
        result = audit_run(self.records.database, self.plan.settings, self.folder)
        step, path = newest_checkpoint(self.folder.checkpoints) or (0, "none yet")
        steps = self.plan.settings.trainer.steps
        return [
            f"step {step} of {steps}" + ("" if step >= steps else "; the same command resumes from here"),
            f"windows: {result.equation}",
            f"audit: {_verdict(result)}",
            *(f"  {one.outcome}: {one.name}: {one.detail}" for one in result.checks if one.outcome != "holds"),
            f"checkpoint: {path}",
        ]


def _verdict(result: AuditResult) -> str:
    if not result.holds:
        return "it does NOT balance"
    return "nothing contradicts, but not everything could be checked" if result.unchecked else "everything balances"
