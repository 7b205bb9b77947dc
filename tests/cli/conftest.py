"""A finished run's folder, made by hand: what audit, report and summary read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine

from cli.run_folder import RunFolder
from shared.configuration import load_settings
from shared.database import StepRow, migrate, open_database, transaction
from shared.ledger import Ledger, WindowStart
from shared.records import DocumentKey
from shared.settings import Settings


def key(position: int, *, window: int = 0, epoch: int = 0) -> DocumentKey:
    return DocumentKey(part=0, epoch=epoch, position=position, window=window)


@dataclass
class MadeRun:
    """A run folder with a database, and hands to fill it."""

    folder: RunFolder
    settings: Settings
    engine: Engine
    ledger: Ledger

    def read(self, *keys: DocumentKey) -> None:
        self.ledger.begin([WindowStart(one, f"a.jsonl:{one.position}", 100) for one in keys])

    def score(self, *keys: DocumentKey) -> None:
        for one in keys:
            self.ledger.mark_scored(one, num_chunks=1, num_dropped_chunks=0, policy_version=0)

    def checkpoint(self, step: int, finished: dict[str, int | None], partial: tuple[str, ...] = ()) -> None:
        """What the trainer's state.json says about documents."""
        folder = self.folder.checkpoints / f"step-{step:08d}"
        folder.mkdir(parents=True)
        state = {
            "step": step,
            "policy_version": step,
            "finished": {document: {"entry_id": "0-1", "step": at} for document, at in finished.items()},
            "partial": {document: {"used": 1, "step": step} for document in partial},
        }
        (folder / "state.json").write_text(json.dumps(state))

    def step(self, number: int, **figures: float) -> None:
        with transaction(self.engine) as session:
            row = StepRow(run_id="made", step=number, at=100.0 + number, policy_version=number, figures=figures)
            session.add(row)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[MadeRun]:
    overrides = ["--run.name", "made", "--run.directory", str(tmp_path), "--policy.model", "m"]
    settings = load_settings(None, overrides, {})
    folder = RunFolder(settings.run.folder)
    folder.create()
    folder.adopt(settings)
    engine = open_database(settings.database_url)
    migrate(engine)
    ledger = Ledger(engine, "made")
    ledger.open_run(settings.model_dump(mode="json"))
    yield MadeRun(folder, settings, engine, ledger)
    engine.dispose()
