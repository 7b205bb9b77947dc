"""Parquet files, read in row batches: only the needed columns, and no row group before the first wanted row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.collector.sources.base import RawRecord, refuse
from services.collector.sources.files import find_files
from shared.errors import SourceError

_BATCH_ROWS = 64
"""Few: one row may be a document of megabytes."""


class ParquetReader:
    """Rows of all files, one after another."""

    def __init__(self, path: str, *, columns: tuple[str, ...]) -> None:
        self._files = find_files(path, suffixes=(".parquet", ".pq"))
        self._columns = columns

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        first = 0
        for file in self._files:
            parquet = _open(file)
            if parquet is None:
                if first >= start and (first - start) % step == 0:
                    yield RawRecord(f"{file}:1", refuse("broken_file", f"{file} is not a Parquet file"))
                first += 1
                continue
            with parquet:
                yield from self._rows(parquet, file, first=first, start=start, step=step)
                first += parquet.metadata.num_rows

    def _rows(self, parquet: Any, file: Path, *, first: int, start: int, step: int) -> Iterator[RawRecord]:
        """Wanted rows of one file whose row 0 is record `first` of the source."""
        names = parquet.schema_arrow.names
        columns = [name for name in self._columns if name in names]
        begin = first
        for group in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            if end > start:
                for index, batch in _batches(parquet, file, group, columns, begin):
                    offset = _first_wanted(index, start=start, step=step)
                    for row in range(offset, batch.num_rows, step):
                        yield _record(f"{file}:{index + row - first + 1}", batch, row, names)
            begin = end


def _open(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid:
        return None
    except OSError as exc:
        raise SourceError(f"{file} can't be opened: {exc}") from exc


def _batches(parquet: Any, file: Path, group: int, columns: list[str], begin: int) -> Iterator[tuple[int, Any]]:
    """Row batches of one row group with the record number of their first row."""
    try:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
            yield begin, batch
            begin += batch.num_rows
    except (pa.ArrowException, OSError) as exc:
        raise SourceError(f"{file}: row group {group} can't be read: {exc}") from exc


def _first_wanted(index: int, *, start: int, step: int) -> int:
    """Offset of the first wanted record at or after record `index`."""
    return start - index if index <= start else (start - index) % step


def _record(place: str, batch: Any, row: int, names: list[str]) -> RawRecord:
    # Converted at once: a scalar that is kept would keep its whole batch. Columns left out are named, for messages.
    try:
        fields = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as exc:
        return RawRecord(place, refuse("invalid_utf8", f"{place}: byte {exc.start} of a field is not UTF-8"))
    if not fields:
        known = ", ".join(repr(name) for name in names[:10])
        return RawRecord(place, refuse("no_text_field", f"{place}: none of the wanted columns; columns here: {known}"))
    return RawRecord(place, lambda: fields)
