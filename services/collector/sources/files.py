"""Files: found by path, folder or glob, and read line by line in bounded memory. Also the reader of text files."""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, cast

import zstandard

from services.collector.sources.base import RawRecord, RefusedError
from shared.errors import SourceError, SourceReadError
from shared.identity import Manifest
from shared.settings import DocumentsSettings

CORRUPT = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What a damaged compressed file raises: its rest is refused. Another OSError is retried (source.py)."""
_MAX_ZSTD_WINDOW = 2**31  # corpora are often packed with `zstd --long=31`


@dataclass(frozen=True)
class SourceFile:
    """A file of the source. Names of files are bytes: `place` and `name` show those that are not UTF-8 as `\\xe9`, so
    that every text made of them can be stored."""

    path: Path
    place: str
    """The path, for places and messages."""
    name: str
    """The path from the source's root, for the manifest."""
    size: int
    """Bytes."""


def find_files(path: str, *, suffixes: tuple[str, ...]) -> list[SourceFile]:
    """The files of `path` (a file, folder or glob), sorted. Folders are searched for `suffixes` (empty: all) and not
    for hidden files. SourceError if there are none."""
    root = Path(path)
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.is_file() and _wanted(file.relative_to(root), suffixes)]
    elif root.is_file():  # first: a file's name may itself look like a glob
        root, found = root.parent, [root]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
        root = Path(*takewhile(lambda piece: glob.escape(piece) == piece, root.parts))
    if not found:
        kinds = f" with a name ending in {', '.join(suffixes)}" if root.is_dir() and suffixes else ""
        raise SourceError(f"documents.path = {path!r} matches no file{kinds} (working directory {Path.cwd()})")
    return [_source_file(file, root) for file in sorted(found, key=lambda file: file.as_posix())]


def _wanted(file: Path, suffixes: tuple[str, ...]) -> bool:
    hidden = any(piece.startswith(".") for piece in file.parts)
    return not hidden and (not suffixes or file.name.endswith(suffixes))


def _source_file(file: Path, root: Path) -> SourceFile:
    try:
        size = file.stat().st_size
    except OSError as exc:
        raise SourceError(f"{_shown(file)} can't be read: {exc.strerror}") from exc
    return SourceFile(path=file, place=_shown(file), name=_shown(file.relative_to(root)), size=size)


def _shown(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def open_lines(file: SourceFile) -> BinaryIO:
    """The file's content, decompressed by its suffix. SourceReadError if it can't be opened."""
    path = file.path
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix in (".zst", ".zstd"):
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
            return io.BufferedReader(decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True))
        return path.open("rb")
    except OSError as exc:
        raise SourceReadError(f"{file.place} can't be opened: {exc.strerror}") from exc


def bounded_lines(stream: BinaryIO, *, max_bytes: int) -> Iterator[bytes | int]:
    """Lines without their newline. Of a line above `max_bytes` only the length is given: it never lies in memory."""
    while line := stream.readline(max_bytes + 1):
        is_whole = line.endswith(b"\n") or len(line) <= max_bytes
        yield line.removesuffix(b"\n") if is_whole else len(line) + _skip_line(stream)


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(1 << 16):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            return skipped - 1
    return skipped


class FileReader:
    """What the readers of files share."""

    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of the files to look for in folders; empty: all."""

    def __init__(self, settings: DocumentsSettings) -> None:
        self._settings = settings
        self._files = find_files(settings.path, suffixes=self.suffixes)

    def manifest(self) -> Manifest:
        return Manifest({file.name: file.size for file in self._files})


class TextReader(FileReader):
    """One document per file; a file is read only when its turn has come."""

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        for file in self._files[start::step]:
            yield RawRecord(f"{file.place}:1", partial(self._load, file))

    def _load(self, file: SourceFile) -> Mapping[str, Any]:
        max_bytes = self._settings.max_document_bytes
        try:
            with file.path.open("rb") as stream:
                content = stream.read(max_bytes + 1)
        except PermissionError as exc:  # of this file, for as long as it stays so
            raise RefusedError("broken_file", f"{file.place}:1: the file can't be read: {exc.strerror}") from exc
        except OSError as exc:
            raise SourceReadError(f"{file.place} can't be read: {exc.strerror}") from exc
        if len(content) > max_bytes:
            detail = f"{file.place}:1: the file has {file.path.stat().st_size} bytes, documents.max_document_bytes is"
            raise RefusedError("too_large", f"{detail} {max_bytes}")
        try:
            return {self._settings.text_field: content.decode("utf-8-sig")}
        except UnicodeDecodeError as exc:
            line = content.count(b"\n", 0, exc.start) + 1
            detail = f"{file.place}:{line}: byte {exc.start} of the file is not UTF-8"
            raise RefusedError("invalid_utf8", detail) from exc
