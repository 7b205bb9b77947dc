"""Parquet files, read in row batches: only the needed columns, and no row group before the first wanted row."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.collector.sources.base import RawRecord, columns_of, refuse, row_record
from services.collector.sources.files import FileReader, SourceFile
from shared.errors import SourceError, SourceReadError

_BATCH_ROWS = 64  # few: one row may be a document of megabytes
_BUFFER_BYTES = 1 << 20
"""Columns are read in pieces: a whole column of a row group may be as large as many shuffle blocks."""


class ParquetReader(FileReader):
    """Rows of all files, one after another."""

    suffixes = (".parquet", ".pq")

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        first = 0
        for file in self._files:
            parquet = _open(file)
            if parquet is None:
                if first >= start and (first - start) % step == 0:
                    yield RawRecord(f"{file.place}:1", refuse("broken_file", f"{file.place} is not a Parquet file"))
                first += 1
                continue
            with parquet:
                yield from self._rows(parquet, file, first=first, start=start, step=step)
                first += parquet.metadata.num_rows

    def _rows(self, parquet: Any, file: SourceFile, *, first: int, start: int, step: int) -> Iterator[RawRecord]:
        """Wanted rows of one file whose row 0 is record `first` of the source."""
        names = parquet.schema_arrow.names
        columns = [name for name in columns_of(self._settings) if name in names]
        begin = first
        for group in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            if end > start:
                for index, batch in _batches(parquet, file, group, columns, begin):
                    for row in range(max(start - index, (start - index) % step), batch.num_rows, step):
                        yield _record(f"{file.place}:{index + row - first + 1}", batch, row, names)
            begin = end


def _open(file: SourceFile) -> Any:
    try:
        return pq.ParquetFile(file.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except pa.ArrowInvalid:
        return None
    except OSError as exc:
        raise SourceReadError(f"{file.place} can't be opened: {exc}") from exc


def _batches(parquet: Any, file: SourceFile, group: int, columns: list[str], begin: int) -> Iterator[tuple[int, Any]]:
    """Row batches of one row group with the record number of their first row."""
    try:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
            yield begin, batch
            begin += batch.num_rows
    except OSError as exc:
        raise SourceReadError(f"{file.place}: row group {group} can't be read: {exc}") from exc
    except pa.ArrowException as exc:
        raise SourceError(f"{file.place}: row group {group} is damaged: {exc}") from exc


def _record(place: str, batch: Any, row: int, names: list[str]) -> RawRecord:
    # Converted at once: a scalar that is kept would keep its whole batch.
    try:
        fields = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as exc:
        return RawRecord(place, refuse("invalid_utf8", f"{place}: byte {exc.start} of a field is not UTF-8"))
    return row_record(place, fields, names=names)
