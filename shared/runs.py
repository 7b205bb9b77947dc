"""Which settings a run keeps for life, and the comparison that refuses others.

Called by `Ledger.open_run` (every process), by the launcher for the run folder (cli/run_folder.py) and by
`headwater check`. Settings are compared as they were written, so that those of an older version can be read.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import zstandard

from shared.errors import SettingsError, SourceError
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


_MAX_BYTES = 1 << 30
_MAX_NAMED = 3


@dataclass(frozen=True)
class Manifest:
    """Documents as they were found."""

    files: Mapping[str, int]
    """Size in bytes by name, relative to the folder that `documents.path` means."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else tells the documents from others, such as a data set's name and number of rows."""

    def stored(self) -> dict[str, Any]:
        """As it is kept in `runs.source`."""
        packed = orjson.dumps([sorted(self.files.items()), dict(self.facts)], option=orjson.OPT_SORT_KEYS)
        return {
            "digest": hashlib.blake2b(packed, digest_size=16).hexdigest(),
            "num_files": len(self.files),
            "num_bytes": sum(self.files.values()),
            "content": base64.b64encode(zstandard.ZstdCompressor(level=9).compress(packed)).decode(),
        }

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> "Manifest":
        packed = zstandard.ZstdDecompressor().decompress(
            base64.b64decode(stored["content"]), max_output_size=_MAX_BYTES
        )
        files, facts = orjson.loads(packed)
        return cls(files=dict(files), facts=facts)

    def differences(self, now: "Manifest") -> list[str]:
        """In words how `now` differs from this one; each kind of change names its first few files."""
        added = sorted(now.files.keys() - self.files.keys())
        gone = sorted(self.files.keys() - now.files.keys())
        kept = sorted(self.files.keys() & now.files.keys())
        other = [
            f"{name}: {self.files[name]} bytes, now {now.files[name]}"
            for name in kept
            if self.files[name] != now.files[name]
        ]
        facts = [
            f"{name} was {self.facts.get(name)!r} and is now {now.facts.get(name)!r}"
            for name in sorted(self.facts.keys() | now.facts.keys())
            if self.facts.get(name) != now.facts.get(name)
        ]
        counted = [("was", "were", "added", added), ("is", "are", "gone", gone), ("has", "have", "another size", other)]
        return [_said(*kind) for kind in counted if kind[3]] + facts


def refuse_changed_source(kept: Mapping[str, Any], now: Manifest, *, run: str) -> None:
    """SourceError that names what changed since `kept` (what `Manifest.stored` gave) was written."""
    if kept["digest"] == now.stored()["digest"]:
        return
    changes = "; ".join(Manifest.load(kept).differences(now))
    raise SourceError(
        f"the documents of run {run!r} have changed since it began, so its positions would mean other records: "
        f"{changes}. Put them back, or start a new run with --run.name NAME"
    )


def _said(one: str, many: str, what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    return f"{len(names)} {f'file {one}' if len(names) == 1 else f'files {many}'} {what} ({shown})"
