"""JSON lines, plain or compressed (.gz, .zst): one object a line. Blank lines are no records."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import orjson

from services.collector.sources.base import RawRecord, RefusedError, refuse
from services.collector.sources.files import CORRUPT, FileReader, SourceFile, bounded_lines, open_lines
from shared.errors import SourceReadError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlReader(FileReader):
    """Records of all files, one after another."""

    suffixes = tuple(map("".join, product((".jsonl", ".ndjson", ".json"), ("", ".gz", ".zst", ".zstd"))))

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        index = 0
        for file in self._files:
            for number, line in self._lines(file):
                if index >= start and (index - start) % step == 0:
                    yield self._record(f"{file.place}:{number}", line)
                index += 1

    def _lines(self, file: SourceFile) -> Iterator[tuple[int, bytes | int | str]]:
        """Numbered lines that are not blank; what is wrong with the rest of the file, as text, is the last of them."""
        number = 0
        with open_lines(file) as stream:
            try:
                for number, line in enumerate(
                    bounded_lines(stream, max_bytes=self._settings.max_document_bytes), start=1
                ):
                    if isinstance(line, int) or (line and not line.isspace()):
                        yield number, line
            except CORRUPT as exc:
                yield number + 1, f"the file is damaged from here on ({exc or type(exc).__name__})"
            except OSError as exc:
                raise SourceReadError(f"{file.place} can't be read after line {number}: {exc.strerror}") from exc

    def _record(self, place: str, line: bytes | int | str) -> RawRecord:
        if isinstance(line, str):
            return RawRecord(place, refuse("broken_file", f"{place}: {line}"))
        if isinstance(line, int):
            detail = f"{place}: the line has {line} bytes, documents.max_document_bytes is"
            return RawRecord(place, refuse("too_large", f"{detail} {self._settings.max_document_bytes}"))
        return RawRecord(place, partial(_parse, place, line), num_bytes=len(line))


def _parse(place: str, line: bytes) -> Mapping[str, Any]:
    value = _load(place, line.removeprefix(_BYTE_ORDER_MARK))
    if not isinstance(value, dict):
        raise RefusedError("not_an_object", f"{place}: expected a JSON object, got {_shown(line)}")
    return value


def _load(place: str, line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    # orjson refuses NaN and lone surrogates, which other writers put in fields that don't matter here.
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise RefusedError("invalid_utf8", f"{place}: byte {exc.start} of the line is not UTF-8") from exc
    except (ValueError, RecursionError) as exc:
        raise RefusedError("not_json", f"{place}: not JSON ({exc}): {_shown(line)}") from exc


def _shown(line: bytes) -> str:
    return repr(line[:80].decode("utf-8", errors="replace"))
