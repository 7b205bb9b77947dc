"""Reads that fail for a moment are made again: no record is skipped, none comes twice."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.collector.sources.base import Document, RawRecord
from services.collector.sources.source import PatientReads, Source, open_source
from shared import metrics
from shared.errors import SourceError, SourceReadError
from shared.settings import DocumentsSettings


class Flaky:
    """Records 0 ... 39. Reading record i fails `failures[i]` times, loading it `loads[i]` times."""

    def __init__(self, failures: dict[int, int], loads: dict[int, int] | None = None) -> None:
        self._failures, self._loads = Counter(failures), Counter(loads or {})

    def read(self, *, start: int, step: int) -> Iterator[RawRecord]:
        for index in range(start, 40, step):
            self._fail(self._failures, index)
            yield RawRecord(f"{index}", lambda index=index: self._load(index))  # type: ignore[misc]

    def _load(self, index: int) -> dict[str, Any]:
        self._fail(self._loads, index)
        return {"text": str(index)}

    def _fail(self, failures: Counter[int], index: int) -> None:
        if failures[index]:
            failures[index] -= 1
            raise SourceReadError(f"record {index}: the connection broke")


def dealt(reader: Flaky, *, give_up_s: float = 30.0) -> Source:
    settings = DocumentsSettings(num_parts=2, shuffle_buffer=4)
    reads = PatientReads(give_up_s=give_up_s, max_wait_s=0.001)
    return Source(reader, settings, seed=0, vocabulary_size=10, reads=reads)  # type: ignore[arg-type]


def contents(source: Source, *, part: int = 0, start: int = 0) -> list[Any]:
    return [item.content for item in source.read(part, epoch=0, start=start) if isinstance(item, Document)]


def test_reads_that_fail_in_the_middle_skip_nothing_and_double_nothing() -> None:
    counted = metrics.service_retries_total.labels("documents")._value
    before = counted.get()
    reader = Flaky({2: 1, 8: 3, 9: 1, 22: 2, 38: 1}, loads={4: 2, 30: 1})
    source = dealt(reader)
    assert [contents(source, part=part) for part in range(2)] == [contents(dealt(Flaky({})), part=p) for p in range(2)]
    assert counted.get() == before + 11
    assert (source.trouble, metrics.service_up.labels("documents")._value.get()) == ({}, 1)


def test_a_failure_at_the_first_record_is_configuration() -> None:
    for reader in (Flaky({0: 1}), Flaky({}, loads=dict.fromkeys(range(8), 1))):
        with pytest.raises(SourceReadError, match="the connection broke"):
            contents(dealt(reader))


def test_a_resumed_part_waits_for_its_first_record() -> None:
    assert contents(dealt(Flaky({8: 2})), start=4) == contents(dealt(Flaky({})), start=4)


def test_failures_without_end_are_an_error_that_says_how_long() -> None:
    began, source = time.monotonic(), dealt(Flaky({6: 10**9}), give_up_s=0.3)
    with pytest.raises(SourceError, match=r"could not be read for \d+ s, the last time: record 6: the conn") as failed:
        contents(source)
    assert not isinstance(failed.value, SourceReadError)
    assert source.trouble == {"source": "record 6: the connection broke"}
    assert 0.3 <= time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_file_that_is_away_for_a_moment_is_read_when_it_is_back(tmp_path: Path, kind: Any) -> None:
    for name in ("a", "b", "c"):
        text = json.dumps({"text": name}) if kind == "jsonl" else name
        (tmp_path / f"{name}.{kind}").write_text(text)
    documents = DocumentsSettings(path=str(tmp_path), format=kind, shuffle_buffer=1)
    items = open_source(documents, seed=0, vocabulary_size=10).read(0, epoch=0, start=0)
    first, away = next(items), tmp_path / f"b.{kind}"
    away.rename(tmp_path / "elsewhere")
    timer = threading.Timer(0.4, lambda: (tmp_path / "elsewhere").rename(away))
    timer.start()
    found = [item.content if isinstance(item, Document) else item.reason for item in (first, *items)]
    timer.join()
    assert found == ["a", "b", "c"]
