"""Reads what checkpoints say about themselves (state.json), without torch. Used by audit, summary and report."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from shared.errors import HeadwaterError

_FOLDER = re.compile(r"^step-(\d{8})$")


@dataclass(frozen=True)
class StateFile:
    """The part of a checkpoint's state.json that is about documents."""

    folder: Path
    finished: dict[str, int | None]
    """Document id -> the last update that contains it; None where every such update was skipped."""
    partial: tuple[str, ...]


def read_states(checkpoints: Path) -> dict[int, StateFile]:
    """By step. Raises HeadwaterError if a complete checkpoint's state can't be read."""
    if not checkpoints.is_dir():
        return {}
    found = ((match, path) for path in checkpoints.iterdir() if (match := _FOLDER.match(path.name)))
    return {int(match[1]): _read(path) for match, path in sorted(found, key=lambda pair: pair[1].name)}


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
        finished = {document: entry["step"] for document, entry in data["finished"].items()}
        return StateFile(folder, finished, tuple(data["partial"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise HeadwaterError(f"{path} can't be read: {exc!r}; the checkpoint is damaged") from exc
