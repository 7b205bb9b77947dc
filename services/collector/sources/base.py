"""What a source is made of: a reader per format, and the step from a record's fields to a document.

    Reader (jsonl.py, parquet.py, ...) --RawRecord--> Source (source.py) --Document | Refusal--> parts.py

To add a format: a file here with a `Reader`, a case in source.py's `_open_reader`, a value of `documents.format`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from shared.identity import Manifest
from shared.settings import DocumentsSettings

RefusalReason = Literal[
    "not_json", "not_an_object", "no_text_field", "not_text", "invalid_utf8",
    "empty", "too_large", "bad_token_ids", "broken_file", "too_short",
]  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One document at its position in a part's order."""

    position: int
    source_id: str
    """Its own id, or its place where it has none."""
    content: str | tuple[int, ...]
    """Text, or ready token ids of the policy."""


@dataclass(frozen=True)
class Refusal:
    """A record that is no document. It takes a position too, so order never depends on content."""

    position: int
    place: str
    """`file:line`, or `file:row`."""
    reason: RefusalReason
    detail: str
    """A whole sentence with file and line."""


@dataclass(frozen=True)
class RawRecord:
    """A record as found, not yet checked. Shuffle blocks hold these."""

    place: str
    """`file:line`, `file:row`; text that can be stored (SourceFile.place)."""
    load: Callable[[], Mapping[str, Any]]
    """Its fields, or RefusedError; SourceReadError when it can't be read now."""
    num_bytes: int = 0
    """What `load` holds in memory; depends on the content only."""


class Reader(Protocol):
    """Records of one format, file by file in sorted order."""

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        """Records number `start`, `start + step`, ... of the whole source.

        Raises SourceReadError when reading failed and may succeed again, and SourceError when it can't.
        """
        ...

    def manifest(self) -> Manifest:
        """What the documents are. Raises SourceError."""
        ...


class RefusedError(Exception):
    """Raised while a record is loaded; becomes a `Refusal`. Never leaves this package."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def refuse(reason: RefusalReason, detail: str) -> Callable[[], Mapping[str, Any]]:
    """A `load` for a record that is refused already."""

    def load() -> Mapping[str, Any]:
        raise RefusedError(reason, detail)

    return load


_MAX_ID_CHARACTERS = 500


@dataclass(frozen=True)
class Fields:
    """Takes the wanted fields and checks what they hold."""

    settings: DocumentsSettings
    vocabulary_size: int

    def document(self, raw: RawRecord, position: int) -> Document | Refusal:
        try:
            fields = raw.load()
            content = (self._token_ids if self.settings.token_ids_field else self._text)(fields, raw.place)
        except RefusedError as exc:
            return Refusal(position, raw.place, exc.reason, str(exc))
        return Document(position, self._source_id(fields, raw.place), content)

    def _text(self, fields: Mapping[str, Any], place: str) -> str:
        name, max_bytes = self.settings.text_field, self.settings.max_document_bytes
        text = _field(fields, name, place, setting="text_field")
        if not isinstance(text, str):
            raise RefusedError("not_text", f"{place}: field {name!r} is {_kind(text)}, not text")
        if not text.strip():
            raise RefusedError("empty", f"{place}: field {name!r} is empty")
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as exc:
            raise RefusedError("invalid_utf8", f"{place}: character {exc.start} is half of a surrogate pair") from exc
        if num_bytes > max_bytes:
            detail = f"{place}: the text has {num_bytes} bytes, documents.max_document_bytes is {max_bytes}"
            raise RefusedError("too_large", detail)
        return text

    def _token_ids(self, fields: Mapping[str, Any], place: str) -> tuple[int, ...]:
        name = self.settings.token_ids_field
        ids = _field(fields, name, place, setting="token_ids_field")
        if not isinstance(ids, list):
            raise RefusedError("bad_token_ids", f"{place}: field {name!r} is {_kind(ids)}, not a list")
        if not ids:
            raise RefusedError("empty", f"{place}: field {name!r} is empty")
        wrong = next((item for item in ids if type(item) is not int or not 0 <= item < self.vocabulary_size), None)
        if wrong is not None or None in ids:
            expected = f"ids in 0..{self.vocabulary_size - 1} of the policy's tokenizer"
            raise RefusedError("bad_token_ids", f"{place}: field {name!r} holds {wrong!r:.80}, expected {expected}")
        return tuple(ids)

    def _source_id(self, fields: Mapping[str, Any], place: str) -> str:
        found = fields.get(self.settings.id_field)
        known = isinstance(found, str | int) and not isinstance(found, bool) and found != ""
        return str(found)[:_MAX_ID_CHARACTERS].encode(errors="replace").decode() if known else place


def columns_of(settings: DocumentsSettings) -> tuple[str, ...]:
    """The wanted columns of a format that has columns."""
    return (settings.token_ids_field or settings.text_field, settings.id_field)


def _field(fields: Mapping[str, Any], name: str, place: str, *, setting: str) -> Any:
    if name not in fields:
        known = ", ".join(repr(key) for key in list(fields)[:10]) or "none"
        raise RefusedError("no_text_field", f"{place}: no field {name!r} (documents.{setting}); fields here: {known}")
    return fields[name]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


_ITEM_BYTES = 36  # of a list: a Python integer and its place in the list


def row_record(place: str, fields: Mapping[str, Any], *, names: Sequence[str]) -> RawRecord:
    """A record of the row's wanted `fields`; `names` are those of all its columns, for messages.

    Texts are held as UTF-8: one rare character would make a Python text four bytes a character.
    """
    if not fields:
        known = ", ".join(map(repr, names[:10]))
        return RawRecord(place, refuse("no_text_field", f"{place}: none of the wanted columns; columns here: {known}"))
    held = {
        name: _Text(value.encode(errors="surrogatepass")) if isinstance(value, str) else value
        for name, value in fields.items()
    }
    return RawRecord(place, partial(_load, held), num_bytes=sum(map(_num_bytes, held.values())))


class _Text(bytes):
    """UTF-8 that was a text, unlike a column of bytes."""


def _load(held: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        name: value.decode(errors="surrogatepass") if isinstance(value, _Text) else value
        for name, value in held.items()
    }


def _num_bytes(value: object) -> int:
    if isinstance(value, bytes):
        return len(value)
    return _ITEM_BYTES * len(value) if isinstance(value, list) else 0
