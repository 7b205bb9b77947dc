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

from services.collector.backoff import Backoff
from services.collector.sources.base import Document, Fields, RawRecord, Reader, Refusal, Source
from shared import metrics
from shared.errors import SettingsError, SourceError, SourceReadError
from shared.identity import Manifest
from shared.seeds import shuffle_seed
from shared.settings import DocumentsSettings

_log = logging.getLogger(__name__)


_T = TypeVar("_T")


_GIVE_UP_S = 900.0
"""As long as the trainer waits for Redis or the database."""


_MAX_BACKOFF_S = 10.0


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


class Retries:
    """Shared by all parts of one source: what one of them could read was no matter of settings."""

    def __init__(self, *, give_up_s: float = _GIVE_UP_S, max_backoff_s: float = _MAX_BACKOFF_S) -> None:
        """After `give_up_s` of failures in a row SourceError is raised."""
        self._give_up_s = give_up_s
        self._max_backoff_s = max_backoff_s
        self._has_read = False
        self._has_loaded = False
        self.trouble = ""
        """Why the last read failed; empty when it succeeded."""

    def records(self, reader: Reader, *, start: int, step: int) -> Iterator[RawRecord]:
        """What `reader.read` gives."""
        is_resumed = start >= step
        failures = _Failures(self._give_up_s, self._max_backoff_s)
        while True:
            try:
                for record in reader.read(start=start, step=step):
                    self._has_read = True
                    self._note_read(failures)
                    yield record
                    start += step
                return
            except SourceReadError as exc:
                if not (self._has_read or is_resumed):
                    raise
                self._wait(failures, exc)

    def loaded(self, load: Callable[[], _T]) -> _T:
        """What `load` gives, which reads one record."""
        failures = _Failures(self._give_up_s, self._max_backoff_s)
        while True:
            try:
                found = load()
            except SourceReadError as exc:
                if not self._has_loaded:
                    raise
                self._wait(failures, exc)
            else:
                self._has_loaded = True
                self._note_read(failures)
                return found

    def _note_read(self, failures: "_Failures") -> None:
        if failures.number:
            _log.info("the documents are read again after %d failed attempts", failures.number)
            failures.end()
            self.trouble = ""
            metrics.service_up.labels(_SERVICE).set(1)

    def _wait(self, failures: "_Failures", exc: SourceReadError) -> None:
        self.trouble = str(exc)
        metrics.service_up.labels(_SERVICE).set(0)
        pause_s = failures.next_pause_s(exc)
        metrics.service_retries_total.labels(_SERVICE).inc()
        _log.warning("reading the documents failed, trying again in %.1f s: %s", pause_s, exc)
        time.sleep(pause_s)


class _Failures:
    """Failures in a row of one reader."""

    def __init__(self, give_up_s: float, max_backoff_s: float) -> None:
        self._give_up_s = give_up_s
        self._max_backoff_s = max_backoff_s
        self.end()

    def end(self) -> None:
        """A read succeeded."""
        self.number = 0
        self._backoff = Backoff(self._max_backoff_s)

    def next_pause_s(self, exc: SourceReadError) -> float:
        """How long to wait after one more. Raises SourceError when there have been failures for too long."""
        if not self.number:
            self._began = time.monotonic()
        self.number += 1
        lasted_s = time.monotonic() - self._began
        if lasted_s > self._give_up_s:
            raise SourceError(f"the documents could not be read for {lasted_s:.0f} s, the last time: {exc}") from exc
        return self._backoff.next_s()


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
    retries: Retries = field(default_factory=Retries)

    @property
    def trouble(self) -> dict[str, str]:
        return {"source": self.retries.trouble} if self.retries.trouble else {}

    def manifest(self) -> Manifest:
        return self.reader.manifest()

    def read(self, part: int, *, epoch: int, start: int) -> Iterator[Document | Refusal]:
        if not 0 <= part < self.num_parts:
            raise ValueError(f"part must lie in 0..{self.num_parts - 1}, got {part}")
        for position, record in self._shuffled(part, epoch=epoch, start=start):
            yield self.retries.loaded(partial(self.fields.document, record, position))

    def _shuffled(self, part: int, *, epoch: int, start: int) -> Iterator[tuple[int, RawRecord]]:
        """The part's records with their positions, from position `start` on."""
        block, piece = start // self.shuffle_buffer, 0
        position = block * self.shuffle_buffer
        records = self.retries.records(self.reader, start=part + position * self.num_parts, step=self.num_parts)
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
