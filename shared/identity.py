"""What a run keeps for life: its form, the settings that make it what it is, and its documents.

A process that would continue a run under other settings, or over other documents, is refused with the differences:

    refuse_changed_identity(settings_then, settings_now, run="'web' of this database")
    refuse_changed_source(manifest_then, source.manifest(), run="web")

Settings are compared as they were written, not parsed, so that a setting that is gone can still be named.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import zstandard

from shared.errors import SettingsError, SourceError
from shared.records import FORM
from shared.settings import Settings

IDENTITY = ("run.seed", "policy.model", "policy.tokenizer", "documents", "chunks", "trainer.objective")
"""Settings that decide which documents a position means and what was trained: a resumed run must keep them."""
FREE = frozenset({"documents.max_epochs"})
"""Settings within those that may change: more of the same documents."""
_FORM_1_SETTINGS = (("collector", "max_documents_in_flight"), ("chunks", "chunks_per_document"))
"""Every run of form 1 has written them down; later versions have other names for them. A run of form 2 has written
`from_version` into every stage of its schedule."""


def form_of(settings: Mapping[str, Any]) -> int:
    """The form of a run by the settings that it wrote down."""
    if any(name in settings.get(section, {}) for section, name in _FORM_1_SETTINGS):
        return 1
    is_second = any("from_version" in stage for stage in settings.get("collector", {}).get("schedule", ()))
    return 2 if is_second else FORM


def refuse_other_form(form: int, *, run: str) -> None:
    """Raise SettingsError unless this version reads and writes `form`. `run` is its name or folder."""
    if form != FORM:
        version = "an earlier" if form < FORM else "a later"
        raise SettingsError(
            f"run {run!r} was begun by {version} version of Headwater, whose stream and checkpoints this version can't "
            "read: finish it with that version, or start a new run with --run.name NAME"
        )


def refuse_changed_identity(old: Mapping[str, Any], new: Mapping[str, Any], *, run: str) -> None:
    """Raise SettingsError naming every identity setting that differs, old and new. `run` completes "the run ..."."""
    before, after = _identity(old), _identity(new)
    if changes := _changes(before, after):
        raise SettingsError(
            f"the run {run} can't be resumed with other settings: {'; '.join(changes)}. "
            "Put them back, or start a new run with --run.name NAME"
        )


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r} and is now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every identity setting in the dump or the TOML of a `Settings`."""
    defaults = Settings().model_dump(mode="json")
    found: dict[str, Any] = {}
    for place in IDENTITY:
        section, _, key = place.partition(".")
        given = data.get(section, {})
        for name in [key] if key else sorted(defaults[section].keys() | given.keys()):
            found[f"{section}.{name}"] = given.get(name, defaults[section].get(name))
    return {name: value for name, value in found.items() if name not in FREE}


_MAX_BYTES = 1 << 30
_MAX_NAMED = 3


@dataclass(frozen=True)
class Manifest:
    files: Mapping[str, int]
    """Size in bytes by name, relative to the folder that `documents.path` means."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else identifies the documents, such as a data set's name and number of rows."""

    def stored(self) -> dict[str, Any]:
        packed = orjson.dumps([sorted(self.files.items()), dict(self.facts)], option=orjson.OPT_SORT_KEYS)
        return {
            "digest": hashlib.blake2b(packed, digest_size=16).hexdigest(),
            "num_files": len(self.files),
            "num_bytes": sum(self.files.values()),
            "content": base64.b64encode(zstandard.ZstdCompressor(level=9).compress(packed)).decode(),
        }

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> "Manifest":
        content = base64.b64decode(stored["content"])
        files, facts = orjson.loads(zstandard.ZstdDecompressor().decompress(content, max_output_size=_MAX_BYTES))
        return cls(files=dict(files), facts=facts)

    def differences(self, now: "Manifest") -> list[str]:
        """In words how `now` differs from this one; each kind of change names its first few files."""
        old, new = self.files, now.files
        kept = sorted(old.keys() & new.keys())
        resized = [f"{name}: {old[name]} bytes, now {new[name]}" for name in kept if old[name] != new[name]]
        changes = [
            ("was", "were", "added", sorted(new.keys() - old.keys())),
            ("is", "are", "gone", sorted(old.keys() - new.keys())),
            ("has", "have", "another size", resized),
        ]
        return [_counted(*change) for change in changes if change[3]] + _changes(self.facts, now.facts)


def refuse_changed_source(kept: Mapping[str, Any], now: Manifest, *, run: str) -> None:
    """Raise SourceError naming what changed since `kept` (from `Manifest.stored`) was written."""
    if kept["digest"] == now.stored()["digest"]:
        return
    changes = "; ".join(Manifest.load(kept).differences(now))
    raise SourceError(
        f"the documents of run {run!r} have changed since it began, so its positions would mean other records: "
        f"{changes}. Put them back, or start a new run with --run.name NAME"
    )


def _counted(one: str, many: str, what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    return f"{len(names)} {f'file {one}' if len(names) == 1 else f'files {many}'} {what} ({shown})"
