"""Folders of text files: each file is one document, named by its path."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from services.collector.sources.base import RawRecord, RefusedError
from services.collector.sources.files import SourceFile, find_files, manifest_of
from shared.errors import SourceReadError
from shared.manifest import Manifest


class TextReader:
    """Files in sorted order; a file is read only when its turn has come."""

    def __init__(self, path: str, *, text_field: str, max_document_bytes: int) -> None:
        self._files = find_files(path, suffixes=())
        self._text_field = text_field
        self._max_bytes = max_document_bytes

    def manifest(self) -> Manifest:
        return manifest_of(self._files)

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        for file in self._files[start::step]:
            yield RawRecord(f"{file.place}:1", partial(self._load, file))

    def _load(self, file: SourceFile) -> Mapping[str, Any]:
        try:
            with file.path.open("rb") as stream:
                content = stream.read(self._max_bytes + 1)
        except PermissionError as exc:  # of this file, for as long as it stays so
            raise RefusedError("broken_file", f"{file.place}:1: the file can't be read: {exc.strerror}") from exc
        except OSError as exc:
            raise SourceReadError(f"{file.place} can't be read: {exc.strerror}") from exc
        if len(content) > self._max_bytes:
            detail = f"{file.place}:1: the file has {file.path.stat().st_size} bytes, documents.max_document_bytes is"
            raise RefusedError("too_large", f"{detail} {self._max_bytes}")
        try:
            return {self._text_field: content.decode("utf-8-sig")}
        except UnicodeDecodeError as exc:
            line = content.count(b"\n", 0, exc.start) + 1
            raise RefusedError(
                "invalid_utf8", f"{file.place}:{line}: byte {exc.start} of the file is not UTF-8"
            ) from exc
