"""Any Hugging Face dataset, by name or local path, streamed through `datasets`: nothing is downloaded whole."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from services.collector.sources.base import RawRecord, row_record
from shared.errors import SettingsError, SourceReadError
from shared.identity import Manifest
from shared.secret_urls import without_secrets


class HuggingFaceReader:
    """Rows of one split in the dataset's own order."""

    def __init__(self, name: str, *, subset: str, split: str, columns: tuple[str, ...]) -> None:
        self._name, self._subset, self._split, self._columns = name, subset, split, columns

    def manifest(self) -> Manifest:
        """Files of the split with their sizes, and the number of rows if it is known. Raises SourceReadError."""
        builder = self._builder()
        splits = builder.info.splits or {}
        num_rows = splits[self._split].num_examples if self._split in splits else None
        files = (builder.config.data_files or {}).get(self._split, [])
        name = without_secrets(self._name)
        facts = {"name": name, "subset": self._subset, "split": self._split, "num_rows": num_rows}
        return Manifest({_name_of(file, builder.base_path): _size(file) for file in files}, facts)

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        rows = islice(self._rows(start), 0, None, step)
        for count, row in enumerate(rows):
            place = f"{without_secrets(self._name)}[{self._split}]:{start + count * step + 1}"
            wanted = {name: row[name] for name in self._columns if name in row}
            yield row_record(place, wanted, names=list(row))

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        builder = self._builder()
        # Builders raise whatever their format's library raises; all of it means that the source can't be read.
        try:
            stream = builder.as_streaming_dataset(split=self._split)
            yield from stream.skip(start) if start else stream
        except Exception as exc:
            raise self._error(exc) from exc

    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as exc:
            remedy = "needs the package datasets: pip install 'headwater[huggingface]'"
            raise SettingsError(f"documents.format = 'huggingface' {remedy}") from exc
        try:
            return datasets.load_dataset_builder(self._name, name=self._subset or None)
        except Exception as exc:
            raise self._error(exc) from exc

    def _error(self, exc: Exception) -> SourceReadError:
        subset = f", documents.subset = {self._subset!r}" if self._subset else ""
        return SourceReadError(
            f"Hugging Face dataset documents.path = {self._name!r}{subset}, documents.split = {self._split!r} "
            f"can't be read: {type(exc).__name__}: {exc}"
        )


def _name_of(file: str, root: str | None) -> str:
    """From the dataset's root, and without the revision of the hub: a new one may hold the same files."""
    plain = re.sub(r"^(hf://[^@]*)@[^/]*", r"\1", file)
    shown = plain.removeprefix(f"{root}/") if root else plain
    return without_secrets(shown).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _size(file: str) -> int:
    """Bytes; -1 where the file system does not tell. Opening the dataset has listed the files already."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(file)
        return int(system.info(path)["size"])
    except (OSError, KeyError, TypeError, ValueError):
        return -1
