"""Reads what checkpoints say about themselves (state.json), without torch. Used by audit, summary and report."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import HeadwaterError
from trainer.evidence import FinishedDocument, PartialDocument

_FOLDER = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class StateFile:
    """The part of a checkpoint's state.json that is about documents."""

    folder: Path
    number: int
    """0 in checkpoints from before they left evidence."""
    finished: dict[str, FinishedDocument]
    partial: dict[str, PartialDocument]
    owes_row: bool
    """The database does not have its step's row; the next start writes it."""


def read_states(checkpoints: Path) -> dict[int, StateFile]:
    """By step. Raises HeadwaterError if a complete checkpoint's state can't be read."""
    if not checkpoints.is_dir():
        return {}
    found: dict[int, StateFile] = {}
    for path in sorted(checkpoints.iterdir()):
        if match := _FOLDER.match(path.name):
            try:
                found[int(match[1])] = _read(path)
            except HeadwaterError:
                if path.exists():  # if not, the trainer has deleted it meanwhile
                    raise
    return found


def newest_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """Step and folder, or None before the first."""
    states = read_states(checkpoints)
    return (step := max(states), states[step].folder) if states else None


def newest_policy(run_folder: Path) -> Path:
    """The policy of a run's newest checkpoint. HeadwaterError before the first."""
    newest = newest_checkpoint(run_folder / "checkpoints")
    if newest is None:
        raise HeadwaterError(f"no checkpoint in {run_folder}: the run did not get that far")
    return newest[1] / "policy"


def _read(folder: Path) -> StateFile:
    path = folder / "state.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return StateFile(
            folder=folder,
            number=data.get("number", 0),
            finished={key: FinishedDocument.model_validate(value) for key, value in data["finished"].items()},
            partial={key: PartialDocument.model_validate(value) for key, value in data["partial"].items()},
            owes_row=data.get("row") is not None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise HeadwaterError(f"{path} can't be read: {exc!r}; the checkpoint is damaged") from exc
