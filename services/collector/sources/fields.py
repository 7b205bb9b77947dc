"""From a record's fields to a document, or to the reason why it is none. Pure. Called by dealing.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.collector.sources.base import Document, RawRecord, Refusal, RefusedError

_MAX_ID_CHARACTERS = 500


@dataclass(frozen=True)
class Fields:
    """Which fields to take and what they must hold."""

    text_field: str
    token_ids_field: str
    """Not empty: ready token ids are taken instead of text."""
    id_field: str
    max_document_bytes: int
    vocabulary_size: int

    def document(self, raw: RawRecord, position: int) -> Document | Refusal:
        """The record as a document at `position` of its part."""
        try:
            fields = raw.load()
            content = self._token_ids(fields, raw.place) if self.token_ids_field else self._text(fields, raw.place)
        except RefusedError as exc:
            return Refusal(position, raw.place, exc.reason, str(exc))
        return Document(position, self._source_id(fields, raw.place), content)

    def _text(self, fields: Mapping[str, Any], place: str) -> str:
        text = _field(fields, self.text_field, place, setting="text_field")
        if not isinstance(text, str):
            raise RefusedError("not_text", f"{place}: field {self.text_field!r} is {_kind(text)}, not text")
        if not text.strip():
            raise RefusedError("empty", f"{place}: field {self.text_field!r} is empty")
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as exc:
            raise RefusedError("invalid_utf8", f"{place}: character {exc.start} is half of a surrogate pair") from exc
        if num_bytes > self.max_document_bytes:
            raise RefusedError(
                "too_large",
                f"{place}: the text has {num_bytes} bytes, documents.max_document_bytes is {self.max_document_bytes}",
            )
        return text

    def _token_ids(self, fields: Mapping[str, Any], place: str) -> tuple[int, ...]:
        ids = _field(fields, self.token_ids_field, place, setting="token_ids_field")
        if not isinstance(ids, list):
            raise RefusedError("bad_token_ids", f"{place}: field {self.token_ids_field!r} is {_kind(ids)}, not a list")
        if not ids:
            raise RefusedError("empty", f"{place}: field {self.token_ids_field!r} is empty")
        wrong = next((item for item in ids if type(item) is not int or not 0 <= item < self.vocabulary_size), None)
        if wrong is not None or None in ids:
            raise RefusedError(
                "bad_token_ids",
                f"{place}: field {self.token_ids_field!r} holds {wrong!r:.80}, expected ids in "
                f"0..{self.vocabulary_size - 1} of the policy's tokenizer",
            )
        return tuple(ids)

    def _source_id(self, fields: Mapping[str, Any], place: str) -> str:
        found = fields.get(self.id_field)
        known = isinstance(found, str | int) and not isinstance(found, bool) and found != ""
        return str(found)[:_MAX_ID_CHARACTERS].encode(errors="replace").decode() if known else place


def _field(fields: Mapping[str, Any], name: str, place: str, *, setting: str) -> Any:
    if name not in fields:
        known = ", ".join(repr(key) for key in list(fields)[:10]) or "none"
        raise RefusedError("no_text_field", f"{place}: no field {name!r} (documents.{setting}); fields here: {known}")
    return fields[name]


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
