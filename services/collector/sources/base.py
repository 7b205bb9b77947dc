"""The records and seams of document sources: what a source yields, and what a format's reader must give.

Reader (one per format) --RawRecord--> DealtSource (dealing.py) --Document | Refusal--> parts.py
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shared.manifest import Manifest

RefusalReason = Literal[
    "not_json",
    "not_an_object",
    "no_text_field",
    "not_text",
    "invalid_utf8",
    "empty",
    "too_large",
    "bad_token_ids",
    "broken_file",
    "too_short",
]


@dataclass(frozen=True)
class Document:
    """One document at its position in a part's order."""

    position: int
    source_id: str
    """Its own id, or its place where it has none."""
    content: str | tuple[int, ...]
    """Text, or ready ids of the policy's tokens."""


@dataclass(frozen=True)
class Refusal:
    """A record that is no document. It takes a position all the same, so that order never depends on content."""

    position: int
    place: str
    """`file:line`, or `file:row`."""
    reason: RefusalReason
    detail: str
    """A whole sentence with file and line."""


class Source(Protocol):
    """Documents in an order that depends on nothing but settings and files."""

    @property
    def trouble(self) -> dict[str, str]:
        """Why reading fails now, under the source's own name; empty when it does not."""
        ...

    def read(self, part: int, *, epoch: int, start: int) -> Iterator[Document | Refusal]:
        """Everything of `part` from position `start` of `epoch` to the epoch's end. Blocking: call from a thread.

        Raises SourceError when the source as a whole can't be read.
        """
        ...

    def manifest(self) -> Manifest:
        """What the documents are. Blocking. Raises SourceError."""
        ...


class RefusedError(Exception):
    """Raised while a record is loaded, caught where it becomes a `Refusal`. Never leaves this package."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class RawRecord:
    """A record as found, not looked at yet: what a shuffle block holds."""

    place: str
    """`file:line`, `file:row`; text that can be stored (SourceFile.place)."""
    load: Callable[[], Mapping[str, Any]]
    """Its fields, or RefusedError; SourceReadError when it can't be read now."""
    num_bytes: int = 0
    """What `load` holds in memory, by a rule that depends on the content only."""


class Reader(Protocol):
    """Records of one format, in the order of sorted files."""

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        """Records number `start`, `start + step`, ... of the whole source.

        Raises SourceReadError when reading failed and may succeed again, and SourceError when it can't.
        """
        ...

    def manifest(self) -> Manifest:
        """What the documents are. Raises SourceError."""
        ...


def refuse(reason: RefusalReason, detail: str) -> Callable[[], Mapping[str, Any]]:
    """A `load` for a record that is refused already."""

    def load() -> Mapping[str, Any]:
        raise RefusedError(reason, detail)

    return load
