"""A finished run's folder, made by hand: what audit, report and summary read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from cli.run_folder import RunFolder
from shared.checkpoint_state import EVIDENCE_FILE, Evidence, EvidenceFile, FinishedWindow
from shared.configuration import load_settings
from shared.database import StepRow, WeightVersionRow, transaction
from shared.ledger import Ledger, WindowStart
from shared.records import WindowKey
from shared.runs import Run, open_run
from shared.settings import Settings


def key(position: int, *, window: int = 0, epoch: int = 0) -> WindowKey:
    return WindowKey(part=0, epoch=epoch, position=position, window=window)


@dataclass
class MadeRun:
    """A run folder with a database, and hands to fill it."""

    folder: RunFolder
    settings: Settings
    run: Run

    @property
    def engine(self) -> Engine:
        return self.run.database

    @property
    def ledger(self) -> Ledger:
        return self.run.ledger

    def read(self, *keys: WindowKey) -> None:
        self.ledger.begin([WindowStart(one, f"a.jsonl:{one.position}", 100) for one in keys])

    def score(self, *keys: WindowKey) -> None:
        for one in keys:
            self.ledger.mark_scored(one, num_chunks=1, num_dropped_chunks=0, weight_version=0)

    def train(self, step: int, *documents: str) -> None:
        """A step, its checkpoint, and what follows: each document's only pair is in it."""
        self.step(step, pairs=len(documents))
        self.checkpoint(step, dict.fromkeys(documents, step))
        self.ledger.mark_trained(dict.fromkeys(documents, step), num_pairs=dict.fromkeys(documents, 1))

    def checkpoint(self, step: int, finished: dict[str, int]) -> None:
        """What the trainer's state.json says about documents, and the line that it leaves."""
        lines, _ = self.evidence.read()
        line = Evidence(
            number=len(lines) + 1,
            after=lines[-1].step if lines else 0,
            step=step,
            finished={
                document: FinishedWindow(entry_id=f"{step}-{number}", step=at, num_pairs=1)
                for number, (document, at) in enumerate(finished.items())
            },
        )
        self.write_state(step, line.model_dump(mode="json"))
        self.evidence.append(line)

    def write_state(self, step: int, state: dict[str, Any]) -> None:
        folder = self.folder.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(state | {"weight_version": step}))

    @property
    def evidence(self) -> EvidenceFile:
        return EvidenceFile(self.folder.checkpoints / EVIDENCE_FILE)

    def step(self, number: int, **figures: float) -> None:
        """Its row, and that of the weight version after it; before the first one also that of version 0."""
        with transaction(self.engine) as session:
            session.add(StepRow(run_id="made", step=number, at=100.0 + number, weight_version=number, figures=figures))
            for version in {0, number}:
                row = {"version": version, "step": version, "form": "full", "num_bytes": 9, "seconds": 0.1}
                session.merge(WeightVersionRow(run_id="made", created_at=1.0, **row))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[MadeRun]:
    overrides = ["--run.name", "made", "--run.directory", str(tmp_path), "--policy.model", "m"]
    settings = load_settings(None, overrides, {})
    folder = RunFolder(settings.run.folder)
    folder.create()
    folder.adopt(settings)
    run = open_run(settings)
    yield MadeRun(folder, settings, run)
    run.close()
