"""Rows of formats with columns, as records that hold only what is wanted of them. For parquet.py, huggingface.py."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from services.collector.sources.base import RawRecord, refuse

_ITEM_BYTES = 36
"""An item of a list: a Python integer and its place in the list."""


def row_record(place: str, fields: Mapping[str, Any], *, names: Sequence[str]) -> RawRecord:
    """A record of the row's wanted `fields`; `names` are those of all its columns, for messages.

    Texts are held as UTF-8: one rare character would make a Python text four bytes a character.
    """
    if not fields:
        known = ", ".join(repr(name) for name in names[:10])
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
