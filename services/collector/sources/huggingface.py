"""Any Hugging Face dataset, by name or local path, streamed through `datasets`: nothing is downloaded whole."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from services.collector.sources.base import RawRecord
from shared.errors import SourceError
from shared.secret_urls import without_secrets


class HuggingFaceReader:
    """Rows of one split in the dataset's own order."""

    def __init__(self, name: str, *, subset: str, split: str) -> None:
        self._name, self._subset, self._split = name, subset, split

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        rows = islice(self._rows(start), 0, None, step)
        for count, row in enumerate(rows):
            place = f"{without_secrets(self._name)}[{self._split}]:{start + count * step + 1}"
            yield RawRecord(place, partial(dict[str, Any], row))

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        import datasets

        # Builders raise whatever their format's library raises; all of it means that the source can't be read.
        try:
            stream = datasets.load_dataset(self._name, name=self._subset or None, split=self._split, streaming=True)
            yield from stream.skip(start) if start else stream
        except Exception as exc:
            subset = f", documents.subset = {self._subset!r}" if self._subset else ""
            raise SourceError(
                f"Hugging Face dataset documents.path = {self._name!r}{subset}, documents.split = {self._split!r} "
                f"can't be read: {type(exc).__name__}: {exc}"
            ) from exc
