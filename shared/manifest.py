"""What a run's documents are: the names and sizes of their files, kept in the run's row by the first collector.

    collector opens its source -> Manifest -> `Ledger.adopt_source`: kept, or compared with the one kept

Stored compressed: 10 bytes a file, 30 where names are random, so that a corpus of 100,000 files takes one to three
megabytes and the names of those that came or went are still known.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import zstandard

from shared.errors import SourceError

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
