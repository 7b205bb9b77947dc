"""Shuffle blocks that are bounded by bytes: exact resume all the same, and no more in memory than the bound."""

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.collector.sources.base import Document, RawRecord
from services.collector.sources.source import Source, open_source
from shared.settings import DocumentsSettings


class Sized:
    """A reader of records of these sizes in bytes; every fifth is refused. Beside its content a record counts 500."""

    def __init__(self, sizes: list[int]) -> None:
        self._sizes = sizes

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        for index in range(start, len(self._sizes), step):
            fields = {"text": str(index)} if index % 5 else {}
            yield RawRecord(f"{index}", lambda fields=fields: fields, self._sizes[index])  # type: ignore[misc]


def dealt(sizes: list[int], *, buffer: int, max_bytes: int = 0, num_parts: int = 1, seed: int = 0) -> Source:
    settings = DocumentsSettings(num_parts=num_parts, shuffle_buffer=buffer, shuffle_bytes=max_bytes)
    return Source(Sized(sizes), settings, seed=seed, vocabulary_size=10)  # type: ignore[arg-type]


def order(source: Source, *, part: int = 0, epoch: int = 0, start: int = 0) -> list[int]:
    found = list(source.read(part, epoch=epoch, start=start))
    assert [item.position for item in found] == list(range(start, start + len(found)))
    return [int(item.source_id if isinstance(item, Document) else item.place) for item in found]


def test_a_block_within_the_bound_keeps_the_order_that_it_had_without_one() -> None:
    without = [1, 5, 0, 3, 4, 2, 7, 11, 9, 10, 8, 6]  # as the first version of this project dealt them
    assert order(dealt([100] * 12, buffer=6, max_bytes=0)) == without
    assert order(dealt([100] * 12, buffer=6, max_bytes=3601)) == without
    assert order(dealt([100] * 12, buffer=6, max_bytes=3000)) != without


def test_a_piece_ends_with_the_record_that_reaches_the_bound_and_with_its_block() -> None:
    found = order(dealt([1500, 500, 0, 4000, 0, 0, 0, 0], buffer=6, max_bytes=3000))
    pieces = [set(found[:2]), set(found[2:4]), set(found[4:6]), set(found[6:])]
    assert pieces == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]


@given(
    sizes=st.lists(st.integers(0, 3000), max_size=50), num_parts=st.integers(1, 3), buffer=st.integers(1, 12),
    max_bytes=st.integers(0, 20_000), start=st.integers(0, 55), part=st.integers(0, 2), epoch=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_every_position_is_the_same_record_wherever_reading_starts(
    sizes: list[int], num_parts: int, buffer: int, max_bytes: int, start: int, part: int, epoch: int
) -> None:
    source = dealt(sizes, buffer=buffer, max_bytes=max_bytes, num_parts=num_parts)
    whole = order(source, part=part % num_parts, epoch=epoch)
    assert sorted(whole) == list(range(part % num_parts, len(sizes), num_parts))
    assert order(source, part=part % num_parts, epoch=epoch, start=start) == whole[start:]


def test_shuffling_depends_on_seed_part_epoch_and_block_and_stays_within_blocks() -> None:
    def shuffled(*, epoch: int = 0, seed: int = 0, buffer: int = 20) -> list[int]:
        return order(dealt([0] * 40, buffer=buffer, seed=seed), epoch=epoch)

    in_order = list(range(40))
    assert shuffled(buffer=1) == in_order
    assert shuffled() == shuffled()
    assert len({tuple(found) for found in (shuffled(), shuffled(epoch=1), shuffled(seed=1), in_order)}) == 4
    assert sorted(shuffled()[:20]) == in_order[:20]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_blocks_of_all_parts_hold_no_more_than_the_bound(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"{index} " + "x" * 4000, "other": "y" * 4000} for index in range(1200)]
    if kind == "jsonl":
        lines = [json.dumps({"text": row["text"]}) for row in rows]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    documents = DocumentsSettings(
        path=str(tmp_path), format="jsonl" if kind == "jsonl" else "parquet", num_parts=4, shuffle_buffer=300,
        shuffle_bytes=800_000,
    )  # fmt: skip
    source = open_source(documents, seed=0, vocabulary_size=10)
    del rows
    tracemalloc.start()
    parts: list[Iterator[Any]] = [source.read(part, epoch=0, start=0) for part in range(4)]
    for _ in range(290):
        for part in parts:
            next(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000, "without a bound it is 4.8 MB"
