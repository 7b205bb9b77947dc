"""Where a step's figures go: the database, the Prometheus gauge, TensorBoard, Weights & Biases."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy import Engine

from shared import metrics
from shared.configuration import without_passwords
from shared.database import StepRow, transaction
from shared.errors import SettingsError
from shared.settings import Settings
from trainer.figures import StepFigures


class Sink(Protocol):
    def write(self, step: int, policy_version: int, figures: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class DatabaseSink:
    """One StepRow a step; a step redone after a crash replaces its row."""

    def __init__(self, engine: Engine, run_id: str) -> None:
        self._engine = engine
        self._run_id = run_id

    def write(self, step: int, policy_version: int, figures: Mapping[str, float]) -> None:
        row = StepFigures(at=time.time(), policy_version=policy_version, figures=dict(figures))
        write_step(self._engine, self._run_id, step=step, row=row)

    def close(self) -> None:
        """Transactions leave nothing open."""


class MetricsSink:
    def write(self, step: int, policy_version: int, figures: Mapping[str, float]) -> None:
        metrics.step.set(step)
        metrics.policy_version.set(policy_version)
        metrics.trained_tokens_total.inc(figures.get("target_tokens", 0))
        for name, value in figures.items():
            metrics.training_figure.labels(name).set(value)

    def close(self) -> None:
        """The registry lives as long as the process."""


class TensorBoardSink:
    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Events beyond `resume_step` are hidden: those steps are done again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(folder), purge_step=resume_step + 1)

    def write(self, step: int, policy_version: int, figures: Mapping[str, float]) -> None:
        self._writer.add_scalar("policy_version", policy_version, step)
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, settings: Settings) -> None:
        try:
            import wandb
        except ImportError as exc:
            raise SettingsError(
                "trainer.log_wandb is on but wandb is not installed: pip install 'headwater[wandb]', or turn it off"
            ) from exc
        name = settings.run.name
        config = without_passwords(settings).model_dump(mode="json")
        self._run: Any = wandb.init(project="headwater", id=name, name=name, resume="allow", config=config)

    def write(self, step: int, policy_version: int, figures: Mapping[str, float]) -> None:
        self._run.log({"policy_version": policy_version, **figures}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_sinks(settings: Settings, engine: Engine, *, resume_step: int) -> Sequence[Sink]:
    """The database first: it is the record, the others are views."""
    sinks: list[Sink] = [DatabaseSink(engine, settings.run.name), MetricsSink()]
    if settings.trainer.log_tensorboard:
        sinks.append(TensorBoardSink(settings.run.folder / "tensorboard", resume_step=resume_step))
    if settings.trainer.log_wandb:
        sinks.append(WandbSink(settings))
    return sinks


def write_step(engine: Engine, run_id: str, *, step: int, row: StepFigures) -> None:
    """Replaces the row that the step may have."""
    with transaction(engine) as session:
        session.merge(StepRow(run_id=run_id, step=step, **row.model_dump()))


def delete_steps_beyond(engine: Engine, run_id: str, *, step: int) -> int:
    """Rows of steps that no checkpoint contains; they are done again. Returns how many."""
    with transaction(engine) as session:
        condition = (StepRow.run_id == run_id, StepRow.step > step)
        gone = session.scalar(sa.select(sa.func.count()).select_from(StepRow).where(*condition)) or 0
        session.execute(sa.delete(StepRow).where(*condition))
    return gone
