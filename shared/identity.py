"""Which settings a run keeps for life, and the comparison that refuses others.

Called by `Ledger.open_run` (every process), by the launcher for the run folder (cli/run_folder.py) and by
`headwater check`. Settings are compared as they were written, so that those of an older version can be read.
"""

from collections.abc import Mapping
from typing import Any

from shared.errors import SettingsError
from shared.settings import Settings

IDENTITY = ("run.seed", "policy.model", "policy.tokenizer", "documents", "chunks", "trainer.objective")
"""Settings that decide which documents a position means and what was trained: a resumed run must keep them."""
FREE = frozenset({"documents.max_epochs"})
"""Settings within those that may change: more of the same documents."""
WHEN_ABSENT: Mapping[str, Any] = {"documents.shuffle_bytes": 0, "chunks.end_of_text": False}
"""What a run did that was written down before the setting existed, where that is not the default."""


def refuse_changed_identity(old: Mapping[str, Any], new: Mapping[str, Any], *, run: str) -> None:
    """Raise SettingsError naming every identity setting that differs, old and new. `run` completes "the run ..."."""
    before, after = _identity(old), _identity(new)
    changes = [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if changes:
        raise SettingsError(
            f"the run {run} can't be resumed with other settings: {'; '.join(changes)}. "
            "Put them back, or start a new run with --run.name NAME"
        )


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every identity setting in the dump or the TOML of a `Settings`."""
    defaults = Settings().model_dump(mode="json")
    found: dict[str, Any] = {}
    for place in IDENTITY:
        section, _, key = place.partition(".")
        given = data.get(section, {})
        for name in [key] if key else sorted(defaults[section].keys() | given.keys()):
            dotted = f"{section}.{name}"
            found[dotted] = given.get(name, WHEN_ABSENT.get(dotted, defaults[section].get(name)))
    return {name: value for name, value in found.items() if name not in FREE}
