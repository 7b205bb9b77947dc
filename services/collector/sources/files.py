"""Finds files and reads their lines in bounded memory, whatever a line's length. Called by the readers."""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from shared.errors import SourceError

CORRUPT = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
"""What a damaged compressed file raises: its rest is refused. Another OSError stops the collector."""

_MAX_ZSTD_WINDOW = 2**31
"""Corpora are often packed with `zstd --long=31`."""


def find_files(path: str, *, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that `path` (a file, a folder or a glob) means, sorted. Folders are searched for `suffixes`
    (empty: all), hidden files left out. SourceError if there are none."""
    root = Path(path)
    if root.is_dir():
        found = [file for file in root.rglob("*") if file.is_file() and _wanted(file.relative_to(root), suffixes)]
    elif root.is_file():  # first: a file's name may itself look like a glob
        found = [root]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
    if not found:
        kinds = f" with a name ending in {', '.join(suffixes)}" if root.is_dir() and suffixes else ""
        raise SourceError(f"documents.path = {path!r} matches no file{kinds} (working directory {Path.cwd()})")
    return sorted(found, key=lambda file: file.as_posix())


def _wanted(file: Path, suffixes: tuple[str, ...]) -> bool:
    hidden = any(piece.startswith(".") for piece in file.parts)
    return not hidden and (not suffixes or file.name.endswith(suffixes))


def open_lines(path: Path) -> BinaryIO:
    """A buffered binary stream of the file's content, decompressed by its suffix. SourceError if it can't be opened."""
    try:
        if path.suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix in (".zst", ".zstd"):
            decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW)
            raw = decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
            return io.BufferedReader(raw)
        return path.open("rb")
    except OSError as exc:
        raise SourceError(f"{path} can't be opened: {exc}") from exc


def bounded_lines(stream: BinaryIO, *, max_bytes: int) -> Iterator[bytes | int]:
    """Lines without their newline. Of a line above `max_bytes` only the length is given: it never lies in memory."""
    while line := stream.readline(max_bytes + 1):
        if line.endswith(b"\n"):
            yield line[:-1]
        elif len(line) <= max_bytes:
            yield line
        else:
            yield len(line) + _skip_line(stream)


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(1 << 16):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            return skipped - 1
    return skipped
