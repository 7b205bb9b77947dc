"""Deals a source into parts and shuffles each in bounded blocks, so that any position can be resumed exactly.

Record i of the source belongs to part i % num_parts. Within a part, block b is the part's records
b * shuffle_buffer ... (b + 1) * shuffle_buffer - 1. It is cut into pieces: a piece ends with the record that brings it
to the part's share of `shuffle_bytes`, or with its block. Most blocks are one piece. Each piece is permuted by a
generator seeded by (run seed, part, epoch, block, number of the piece).

Position p of an epoch is thus always the same record: the block of p follows from p alone, its pieces from the block's
records alone. Resuming rereads p's block and skips its beginning.
"""

import hashlib
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from services.collector.sources.base import Document, RawRecord, Reader, Refusal
from services.collector.sources.fields import Fields
from services.collector.sources.retrying import Retries
from shared.manifest import Manifest

_RECORD_BYTES = 500
"""What a held record takes beside its content: its objects and its place."""


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
            self._shuffle(held, f"{self.seed}.{part}.{epoch}.{block}" + (f".{piece}" if piece else ""))
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

    def _shuffle(self, held: list[RawRecord], name: str) -> None:
        if self.shuffle_buffer > 1:
            digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
            random.Random(int.from_bytes(digest, "big")).shuffle(held)
