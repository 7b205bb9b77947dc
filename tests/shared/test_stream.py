"""The stream on a real Redis: order, delivery, acknowledgement, restarts."""

import re
import threading
import time
from pathlib import Path

import pytest
import redis

from shared.errors import SettingsError, StreamError
from shared.limits import MAX_ENTRY_BYTES
from shared.stream import (
    GROUP,
    Backlog,
    BrokenEntry,
    DocumentStream,
    StreamEntry,
    connect,
    decode,
    documents_key,
    encode,
)
from tests.services.collector.processes import RedisProcess
from tests.shared.scored import scored_document


def opened(client: redis.Redis, run: str, *, consumer: str = "trainer-0") -> DocumentStream:
    stream = DocumentStream(client, run, consumer=consumer)
    stream.create()
    return stream


def ids(entries: list[StreamEntry | BrokenEntry]) -> list[str]:
    return [entry.document.document_id if isinstance(entry, StreamEntry) else "broken" for entry in entries]


def test_a_document_comes_back_as_it_was_written(client: redis.Redis, run: str) -> None:
    document = scored_document(text="{braces} \x00 漢字 \N{CRAB}")
    stream = opened(client, run)
    stream.write(document)
    (entry,) = stream.read(count=5, block_s=0.1)
    assert isinstance(entry, StreamEntry)
    assert entry.document == document


def test_a_document_that_no_reader_would_take_is_never_written(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    with pytest.raises(
        SettingsError, match=r"document 0\.0\.0\.0 has 268,4\d\d,\d+ bytes, .* takes 268,435,456: lower"
    ):
        stream.write(scored_document(text="x" * MAX_ENTRY_BYTES))
    assert stream.backlog().unread == 0


def test_documents_come_once_and_in_the_order_of_writing(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    for position in range(5):
        stream.write(scored_document(position))
    assert ids(stream.read(count=2, block_s=0.1)) == ["0.0.0.0", "0.0.1.0"]
    assert ids(stream.read(count=9, block_s=0.1)) == ["0.0.2.0", "0.0.3.0", "0.0.4.0"]
    assert stream.read(count=9, block_s=0.05) == []


def test_reading_waits_for_a_document(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    writer = threading.Timer(0.2, lambda: stream.write(scored_document(7)))
    writer.start()
    started = time.monotonic()
    assert ids(stream.read(count=1, block_s=10)) == ["0.0.7.0"]
    assert time.monotonic() - started < 5
    writer.join(5)


def test_what_was_not_acknowledged_is_given_again_also_to_another_consumer(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    for position in range(3):
        stream.write(scored_document(position))
    first, *_ = stream.read(count=3, block_s=0.1)
    stream.acknowledge([first.entry_id])
    successor = opened(client, run, consumer="trainer-1")
    assert ids(list(successor.read_pending(count=1))) == ["0.0.1.0", "0.0.2.0"]
    assert ids(list(stream.read_pending())) == ["0.0.1.0", "0.0.2.0"]


def test_acknowledged_entries_are_gone_and_acknowledging_again_changes_nothing(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    stream.write(scored_document(0))
    stream.write(scored_document(1))
    (entry,) = stream.read(count=1, block_s=0.1)
    for _ in range(2):
        stream.acknowledge([entry.entry_id])
    stream.acknowledge([])
    assert stream.document_ids() == {"0.0.1.0"}
    assert list(stream.read_pending()) == []


def test_backlog_counts_unread_and_pending(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    assert stream.backlog() == Backlog(unread=0, pending=0)
    for position in range(3):
        stream.write(scored_document(position))
    entries = stream.read(count=2, block_s=0.1)
    assert stream.backlog() == Backlog(unread=1, pending=2)
    stream.acknowledge([entries[0].entry_id])
    assert stream.backlog() == Backlog(unread=1, pending=1)


def test_document_ids_pages_over_the_whole_stream(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    for position in range(7):
        stream.write(scored_document(position))
    stream.read(count=2, block_s=0.1)
    assert stream.document_ids(count=3) == {f"0.0.{position}.0" for position in range(7)}


def test_an_entry_that_is_no_document_is_broken_and_does_not_stop_reading(client: redis.Redis, run: str) -> None:
    stream = opened(client, run)
    client.xadd(documents_key(run), {"id": "0.0.9.0", "body": b"no zstd"})
    client.xadd(documents_key(run), {"other": b"x"})
    stream.write(scored_document(1))
    broken, nameless, good = stream.read(count=5, block_s=0.1)
    assert isinstance(broken, BrokenEntry)
    assert isinstance(nameless, BrokenEntry)
    assert (broken.document_id, nameless.document_id) == ("0.0.9.0", "")
    assert "not a scored document" in broken.reason
    assert isinstance(good, StreamEntry)


def test_documents_written_before_the_group_was_made_are_read(client: redis.Redis, run: str) -> None:
    stream = DocumentStream(client, run)
    stream.write(scored_document(0))
    stream.create()
    stream.create()
    assert ids(stream.read(count=1, block_s=0.1)) == ["0.0.0.0"]


def test_decode_refuses_a_record_with_unknown_keys() -> None:
    assert decode(encode(scored_document())) == scored_document()
    with pytest.raises(StreamError, match="not a scored document"):
        decode(b"")


def test_the_stream_survives_a_killed_redis(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    stream = opened(connect(server.url, timeout_s=1), "run")
    stream.write(scored_document(0))
    stream.write(scored_document(1))
    stream.read(count=1, block_s=0.1)
    server.stop()
    with pytest.raises(StreamError, match=re.escape("Redis: ")):
        stream.write(scored_document(2))
    server.start()
    assert stream.backlog() == Backlog(unread=1, pending=1)
    assert ids(list(stream.read_pending())) == ["0.0.0.0"]
    server.stop()


def test_reading_without_a_group_says_so(client: redis.Redis, run: str) -> None:
    with pytest.raises(StreamError, match=GROUP):
        DocumentStream(client, run).read(count=1, block_s=0.01)
