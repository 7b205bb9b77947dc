"""`headwater run` as a person starts it: a process of its own, watched through its output and its database."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cli.audit import AuditResult, audit_run
from cli.init_model import init_model
from cli.run_folder import find_run
from shared.database import CandidateRow, EventRow, StepRow, open_database, transaction
from shared.errors import DatabaseError

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 240.0
_STARTED = re.compile(r"^(\w+) started \(pid (\d+)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A small run: where it lies and what it is made of."""

    folder: Path
    """Holds `model/` and `documents.jsonl`; the run lies in `runs/small`."""
    options: tuple[str, ...] = ()

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / "small"

    def launch(self, *options: str) -> "Launched":
        return Launched(self, [*self.options, *options])

    def audit(self) -> AuditResult:
        folder, settings = find_run(str(self.run_folder))
        engine = open_database(settings.database_url)
        try:
            return audit_run(engine, settings, folder)
        finally:
            engine.dispose()

    def rewards(self) -> list[float]:
        """Of all candidates that were kept in the database."""
        return [reward for reward in self._column(sa.select(CandidateRow.reward)) if reward is not None]

    def steps(self) -> list[int]:
        return self._column(sa.select(StepRow.step).order_by(StepRow.step))

    def event_kinds(self) -> list[str]:
        return self._column(sa.select(EventRow.kind))

    def _column(self, query: sa.Select[Any]) -> list[Any]:
        database = open_database(f"sqlite:///{self.run_folder / 'headwater.db'}")
        with transaction(database) as session:
            found = list(session.scalars(query))
        database.dispose()
        return found


class Launched:
    """One start. Use it in a `with`: whatever happens, nothing of it stays behind."""

    def __init__(self, recipe: Recipe, options: Sequence[str]) -> None:
        self.recipe = recipe
        self._output = recipe.folder / f"output-{time.monotonic_ns()}"
        self._command = [
            sys.executable, "-m", "cli.main", "run", str(ROOT / "configs" / "real-text.toml"),
            "--run.directory", str(recipe.folder / "runs"), "--run.name", "small",
            "--policy.model", str(recipe.folder / "model"), "--documents.path", str(recipe.folder / "documents.jsonl"),
            "--chunks.context_tokens", "64", "--chunks.suffix_tokens", "8", "--chunks.min_prefix_tokens", "8",
            "--chunks.min_suffix_tokens", "4", "--chunks.chunks_per_window", "2", "--trainer.pairs_per_step", "2",
            "--trainer.checkpoint_every", "2", "--collector.record_share", "1",
            "--collector.lease_s", "2", "--trainer.lease_s", "2", "--collector.max_backlog", "4", *options,
        ]  # fmt: skip

    def __enter__(self) -> "Launched":
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(timeout=WAIT_S)

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def pids(self) -> dict[str, int]:
        """Of the newest start of each role."""
        return {role: int(pid) for role, pid in _STARTED.findall(self.output)}

    def num_starts(self, role: str) -> int:
        return sum(found == role for found, _ in _STARTED.findall(self.output))

    def kill(self, role: str) -> None:
        os.kill(self.pids()[role], signal.SIGKILL)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill_launcher(self) -> None:
        self._process.kill()
        self._process.wait(timeout=WAIT_S)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self._step() >= step, what=f"step {step}")

    def wait_until(self, condition: Callable[[], bool], *, what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self._process.poll() is None, f"the run ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"waited too long for {what}:\n{self.output}"
            time.sleep(0.05)

    def finish(self) -> int:
        """Its exit code."""
        try:
            return self._process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end:\n{self.output}") from None

    def _step(self) -> int:
        if not (self.recipe.run_folder / "headwater.db").exists():
            return 0
        try:
            return max(self.recipe.steps(), default=0)
        except DatabaseError:  # not migrated yet
            return 0


def write_model(folder: Path, *, context: int = 64) -> None:
    """A tiny policy in `model/`, its tokenizer from `documents.jsonl`."""
    size: dict[str, Any] = {"vocab_size": 280, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    init_model(documents=str(folder / "documents.jsonl"), out=folder / "model", context=context, **size)


def is_alive(pid: int) -> bool:
    """Zombies are dead: in a container nobody may be there to reap them."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
