"""Deals a source into parts and shuffles each in bounded blocks, so that any position can be resumed exactly.

Record i of the source belongs to part i % num_parts. Within a part, block b holds the part's records
b * shuffle_buffer ... (b + 1) * shuffle_buffer - 1, permuted by a generator seeded by (run seed, part, epoch, b).
Position p of an epoch is thus always the same record: resuming rereads p's block and skips its beginning.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from services.collector.sources.base import Document, Reader, Refusal
from services.collector.sources.fields import Fields


@dataclass(frozen=True)
class DealtSource:
    """A reader's records as documents of parts (the `Source` of a run)."""

    reader: Reader
    fields: Fields
    num_parts: int
    shuffle_buffer: int
    seed: int

    def read(self, part: int, *, epoch: int, start: int) -> Iterator[Document | Refusal]:
        if not 0 <= part < self.num_parts:
            raise ValueError(f"part must lie in 0..{self.num_parts - 1}, got {part}")
        block, offset = divmod(start, self.shuffle_buffer)
        first = block * self.shuffle_buffer
        records = self.reader.read(start=part + first * self.num_parts, step=self.num_parts)
        while held := list(islice(records, self.shuffle_buffer)):
            order = self._order(len(held), part=part, epoch=epoch, block=block)
            for place in range(offset, len(held)):
                yield self.fields.document(held[order[place]], first + place)
            block, first, offset = block + 1, first + self.shuffle_buffer, 0

    def _order(self, size: int, *, part: int, epoch: int, block: int) -> list[int]:
        """Which record of the block comes at each place."""
        order = list(range(size))
        if self.shuffle_buffer > 1:
            digest = hashlib.blake2b(f"{self.seed}.{part}.{epoch}.{block}".encode(), digest_size=8).digest()
            random.Random(int.from_bytes(digest, "big")).shuffle(order)
        return order
