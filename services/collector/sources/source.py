"""The source of a run: records of one format, dealt into parts, shuffled, and resumable at any position.

Record i of the source belongs to part i % num_parts. Block b of a part is its records b * shuffle_buffer to
(b + 1) * shuffle_buffer - 1. A block is cut into pieces: a piece ends with the record that fills the part's share of
`shuffle_bytes`, or with the block; most blocks are one piece. Each piece is shuffled with a seed made from the run's
seed, part, epoch, block and piece number.

So position p of an epoch is always the same record. To resume at p, its block is read again and the beginning skipped.

A read that fails for the moment (a broken connection, a disk error) is retried from the record that failed: none is
skipped or repeated. A source that fails before its first record is a wrong setting, and fails at once.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar

from services.collector.sources.base import Document, Fields, RawRecord, Reader, Refusal, columns_of
from shared import metrics
from shared.errors import SettingsError, SourceError, SourceReadError
from shared.identity import Manifest
from shared.retries import Retries
from shared.seeds import shuffle_seed
from shared.settings import DocumentsSettings

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_GIVE_UP_S = 900.0  # as long as the trainer waits for Redis or the database
_SERVICE = "documents"  # in the metrics of what a collector waits for
_RECORD_BYTES = 500  # what a held record takes beside its content: its objects and its place


def open_source(documents: DocumentsSettings, *, seed: int, vocabulary_size: int) -> "Source":
    """Raises SourceError if no file matches, SettingsError if no path is given."""
    if not documents.path:
        raise SettingsError("documents.path is empty: name a file, folder, glob or Hugging Face dataset")
    return Source(_open_reader(documents), documents, seed=seed, vocabulary_size=vocabulary_size)


def _open_reader(documents: DocumentsSettings) -> Reader:
    if documents.format == "jsonl":
        from services.collector.sources.jsonl import JsonlReader

        return JsonlReader(documents)
    if documents.format == "parquet":
        from services.collector.sources.parquet import ParquetReader

        return ParquetReader(documents)
    if documents.format == "text":
        from services.collector.sources.files import TextReader

        if documents.token_ids_field:
            raise SettingsError("documents.token_ids_field does not go with documents.format = 'text'")
        return TextReader(documents)
    from services.collector.sources.huggingface import HuggingFaceReader

    columns = columns_of(documents)
    return HuggingFaceReader(documents.path, subset=documents.subset, split=documents.split, columns=columns)


class PatientReads:
    """Reads that wait out failures; SourceError after `give_up_s` of them in a row. All parts of a source share one:
    once a part could read, a later failure is no wrong setting."""

    def __init__(self, *, give_up_s: float = _GIVE_UP_S, max_wait_s: float = 10.0) -> None:
        self._retries = Retries(give_up_s=give_up_s, max_wait_s=max_wait_s, on_failure=self._note_down)
        self._has_read = False
        self._has_loaded = False
        self.trouble = ""  # why the last read failed; empty when it succeeded

    def records(self, reader: Reader, *, start: int, step: int) -> Iterator[RawRecord]:
        is_resumed = start >= step
        records: Iterator[RawRecord] | None = None

        def read_next() -> RawRecord | None:
            nonlocal records
            try:
                records = records or reader.read(start=start, step=step)
                return next(records, None)
            except SourceReadError:
                records = None
                raise

        while (record := self._read(read_next, waits=self._has_read or is_resumed)) is not None:
            self._has_read = True
            yield record
            start += step

    def loaded(self, load: Callable[[], _T]) -> _T:
        found = self._read(load, waits=self._has_loaded)
        self._has_loaded = True
        return found

    def _read(self, read: Callable[[], _T], *, waits: bool) -> _T:
        if not waits:
            return read()
        began = time.monotonic()
        try:
            found = self._retries(read)
        except SourceReadError as exc:
            lasted_s = time.monotonic() - began
            raise SourceError(f"the documents could not be read for {lasted_s:.0f} s, the last time: {exc}") from exc
        if self.trouble:
            _log.info("the documents are read again")
            self.trouble = ""
            metrics.service_up.labels(_SERVICE).set(1)
        return found

    def _note_down(self, _attempt: int, error: BaseException) -> None:
        if not self.trouble:
            _log.warning("reading the documents failed, retrying: %s", error)
        self.trouble = str(error)
        metrics.service_up.labels(_SERVICE).set(0)
        metrics.service_retries_total.labels(_SERVICE).inc()


class Source:
    """A reader's records as documents of parts, in an order that depends on nothing but settings and files."""

    def __init__(
        self,
        reader: Reader,
        settings: DocumentsSettings,
        *,
        seed: int,
        vocabulary_size: int,
        reads: PatientReads | None = None,
    ) -> None:
        self._reader = reader
        self._settings = settings
        self._fields = Fields(settings, vocabulary_size)
        self._seed = seed
        self._reads = reads or PatientReads()

    @property
    def trouble(self) -> dict[str, str]:
        """Why reading fails now, under the source's own name; empty when it does not."""
        return {"source": self._reads.trouble} if self._reads.trouble else {}

    def manifest(self) -> Manifest:
        """What the documents are. Blocking. Raises SourceError."""
        return self._reader.manifest()

    def read(self, part: int, *, epoch: int, start: int) -> Iterator[Document | Refusal]:
        """Everything of `part` from position `start` of `epoch` to the epoch's end. Blocking: call from a thread.

        Raises SourceError when the source as a whole can't be read.
        """
        if not 0 <= part < self._settings.num_parts:
            raise ValueError(f"part must lie in 0..{self._settings.num_parts - 1}, got {part}")
        for position, record in self._shuffled(part, epoch=epoch, start=start):
            yield self._reads.loaded(partial(self._fields.document, record, position))

    def _shuffled(self, part: int, *, epoch: int, start: int) -> Iterator[tuple[int, RawRecord]]:
        """The part's records with their positions, from position `start` on."""
        buffer, num_parts = self._settings.shuffle_buffer, self._settings.num_parts
        block, piece = start // buffer, 0
        position = block * buffer
        records = self._reads.records(self._reader, start=part + position * num_parts, step=num_parts)
        while held := self._next_piece(records, room=(block + 1) * buffer - position):
            end = position + len(held)
            if buffer > 1:
                seed = shuffle_seed(self._seed, part, epoch, block, *([piece] if piece else []))
                random.Random(seed).shuffle(held)
            waiting = deque(held[max(0, start - position) :])
            held.clear()  # what was given is held no longer, least of all while the next piece is read
            while waiting:
                yield end - len(waiting), waiting.popleft()
            position = end
            block, piece = (block, piece + 1) if end // buffer == block else (block + 1, 0)

    def _next_piece(self, records: Iterator[RawRecord], *, room: int) -> list[RawRecord]:
        """At most `room` records, none at the end."""
        held: list[RawRecord] = []
        num_bytes, max_bytes = 0, self._settings.shuffle_bytes // self._settings.num_parts
        for record in islice(records, room):
            held.append(record)
            num_bytes += record.num_bytes + _RECORD_BYTES
            if self._settings.shuffle_bytes and num_bytes >= max_bytes:
                break
        return held
