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
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TypeVar

from services.collector.sources.base import Document, Fields, RawRecord, Reader, Refusal, Source
from shared import metrics
from shared.errors import SettingsError, SourceError, SourceReadError
from shared.identity import Manifest
from shared.retries import Retries
from shared.seeds import shuffle_seed
from shared.settings import DocumentsSettings

_log = logging.getLogger(__name__)


_T = TypeVar("_T")


_GIVE_UP_S = 900.0
"""As long as the trainer waits for Redis or the database."""


_SERVICE = "documents"
"""Their name among what a collector waits for, in its metrics."""


_RECORD_BYTES = 500
"""What a held record takes beside its content: its objects and its place."""


def open_source(documents: DocumentsSettings, *, seed: int, vocabulary_size: int) -> Source:
    """Raises SourceError if no file matches, SettingsError if no path is given."""
    if not documents.path:
        raise SettingsError("documents.path is empty: name a file, folder, glob or Hugging Face dataset")
    fields = Fields(
        text_field=documents.text_field,
        token_ids_field=documents.token_ids_field,
        id_field=documents.id_field,
        max_document_bytes=documents.max_document_bytes,
        vocabulary_size=vocabulary_size,
    )
    return DealtSource(
        reader=_open_reader(documents),
        fields=fields,
        num_parts=documents.num_parts,
        shuffle_buffer=documents.shuffle_buffer,
        shuffle_bytes=documents.shuffle_bytes,
        seed=seed,
    )


def _open_reader(documents: DocumentsSettings) -> Reader:
    if documents.format == "jsonl":
        from services.collector.sources.jsonl import JsonlReader

        return JsonlReader(documents.path, max_document_bytes=documents.max_document_bytes)
    if documents.format == "parquet":
        from services.collector.sources.parquet import ParquetReader

        return ParquetReader(documents.path, columns=_columns(documents))
    if documents.format == "text":
        from services.collector.sources.files import TextReader

        if documents.token_ids_field:
            raise SettingsError("documents.token_ids_field does not go with documents.format = 'text'")
        return TextReader(
            documents.path, text_field=documents.text_field, max_document_bytes=documents.max_document_bytes
        )
    from services.collector.sources.huggingface import HuggingFaceReader

    return HuggingFaceReader(
        documents.path, subset=documents.subset, split=documents.split, columns=_columns(documents)
    )


def _columns(documents: DocumentsSettings) -> tuple[str, ...]:
    return (documents.token_ids_field or documents.text_field, documents.id_field)


class PatientReads:
    """Reads that wait out failures. Shared by all parts of one source: what one of them could read is there, so a later
    failure is not a matter of settings."""

    def __init__(self, *, give_up_s: float = _GIVE_UP_S, max_wait_s: float = 10.0) -> None:
        """After `give_up_s` of failures in a row SourceError is raised."""
        self._retries = Retries(give_up_s=give_up_s, max_wait_s=max_wait_s, on_failure=self._note_down)
        self._has_read = False
        self._has_loaded = False
        self.trouble = ""
        """Why the last read failed; empty when it succeeded."""

    def records(self, reader: Reader, *, start: int, step: int) -> Iterator[RawRecord]:
        """What `reader.read` gives."""
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
        """What `load` gives, which reads one record."""
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
            self._note_up()
        return found

    def _note_up(self) -> None:
        _log.info("the documents are read again")
        self.trouble = ""
        metrics.service_up.labels(_SERVICE).set(1)

    def _note_down(self, _attempt: int, error: BaseException) -> None:
        if not self.trouble:
            _log.warning("reading the documents failed, retrying: %s", error)
        self.trouble = str(error)
        metrics.service_up.labels(_SERVICE).set(0)
        metrics.service_retries_total.labels(_SERVICE).inc()


@dataclass(frozen=True)
class DealtSource:
    """A reader's records as documents of parts (the `Source` of a run)."""

    reader: Reader
    fields: Fields
    num_parts: int
    shuffle_buffer: int
    shuffle_bytes: int
    """Of the pieces of all parts together; 0: no bound."""
    seed: int
    reads: PatientReads = field(default_factory=PatientReads)

    @property
    def trouble(self) -> dict[str, str]:
        return {"source": self.reads.trouble} if self.reads.trouble else {}

    def manifest(self) -> Manifest:
        return self.reader.manifest()

    def read(self, part: int, *, epoch: int, start: int) -> Iterator[Document | Refusal]:
        if not 0 <= part < self.num_parts:
            raise ValueError(f"part must lie in 0..{self.num_parts - 1}, got {part}")
        for position, record in self._shuffled(part, epoch=epoch, start=start):
            yield self.reads.loaded(partial(self.fields.document, record, position))

    def _shuffled(self, part: int, *, epoch: int, start: int) -> Iterator[tuple[int, RawRecord]]:
        """The part's records with their positions, from position `start` on."""
        block, piece = start // self.shuffle_buffer, 0
        position = block * self.shuffle_buffer
        records = self.reads.records(self.reader, start=part + position * self.num_parts, step=self.num_parts)
        while held := self._next_piece(records, room=(block + 1) * self.shuffle_buffer - position):
            end = position + len(held)
            self._shuffle(held, shuffle_seed(self.seed, part, epoch, block, *([piece] if piece else [])))
            waiting = deque(held[max(0, start - position) :])
            held.clear()  # what was given is held no longer, least of all while the next piece is read
            while waiting:
                yield end - len(waiting), waiting.popleft()
            position = end
            block, piece = (block, piece + 1) if end // self.shuffle_buffer == block else (block + 1, 0)

    def _next_piece(self, records: Iterator[RawRecord], *, room: int) -> list[RawRecord]:
        """At most `room` records, none at the end."""
        held: list[RawRecord] = []
        num_bytes, max_bytes = 0, self.shuffle_bytes // self.num_parts
        for record in islice(records, room):
            held.append(record)
            num_bytes += record.num_bytes + _RECORD_BYTES
            if self.shuffle_bytes and num_bytes >= max_bytes:
                break
        return held

    def _shuffle(self, held: list[RawRecord], seed: int) -> None:
        if self.shuffle_buffer > 1:
            random.Random(seed).shuffle(held)
