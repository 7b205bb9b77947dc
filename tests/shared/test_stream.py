"""The stream on a real Redis: order, delivery, acknowledgement, restarts."""

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
import zstandard

from shared.comparisons import pack
from shared.coordination import Coordination
from shared.errors import FencedError, SettingsError, StreamError, StreamSchemaError
from shared.limits import MAX_ENTRY_BYTES
from shared.records import Lease
from shared.redis import connect, lease_key, windows_key
from shared.stream import GROUP, SCHEMA, Backlog, BrokenEntry, StreamEntry, WindowStream, decode, encode
from tests.services.collector.processes import RedisProcess
from tests.shared.scored import scored_window


def opened(client: redis.Redis, run: str, *, consumer: str = "trainer-0") -> WindowStream:
    stream = WindowStream(client, run, consumer=consumer)
    stream.create()
    return stream


@pytest.fixture
def stream(client: redis.Redis, run: str) -> WindowStream:
    return opened(client, run)


def ids(entries: list[StreamEntry | BrokenEntry]) -> list[str]:
    return [entry.window.window_id if isinstance(entry, StreamEntry) else "broken" for entry in entries]


def test_a_document_comes_back_as_it_was_written(client: redis.Redis, run: str) -> None:
    window = scored_window(text="{braces} \x00 漢字 \N{CRAB}")
    stream = opened(client, run)
    stream.write(window)
    (entry,) = stream.read(count=5, block_s=0.1)
    assert isinstance(entry, StreamEntry)
    assert entry.window == window


def test_a_document_that_no_reader_would_take_is_never_written(stream: WindowStream) -> None:
    with pytest.raises(SettingsError, match=r"window 0\.0\.0\.0 has 268,4\d\d,\d+ bytes, .* takes 268,435,456: lower"):
        stream.write(scored_window(text="x" * MAX_ENTRY_BYTES))
    assert stream.backlog().unread == 0


def test_documents_come_once_and_in_the_order_of_writing(stream: WindowStream) -> None:
    for position in range(5):
        stream.write(scored_window(position))
    assert ids(stream.read(count=2, block_s=0.1)) == ["0.0.0.0", "0.0.1.0"]
    assert ids(stream.read(count=9, block_s=0.1)) == ["0.0.2.0", "0.0.3.0", "0.0.4.0"]
    assert stream.read(count=9, block_s=0.05) == []


def test_reading_waits_for_a_document(stream: WindowStream) -> None:
    writer = threading.Timer(0.2, lambda: stream.write(scored_window(7)))
    writer.start()
    started = time.monotonic()
    assert ids(stream.read(count=1, block_s=10)) == ["0.0.7.0"]
    assert time.monotonic() - started < 5
    writer.join(5)


def test_what_was_not_acknowledged_is_given_again_also_to_another_consumer(
    client: redis.Redis, run: str, stream: WindowStream
) -> None:
    for position in range(3):
        stream.write(scored_window(position))
    first, *_ = stream.read(count=3, block_s=0.1)
    stream.acknowledge({first.entry_id: "0.0.0.0"})
    successor = opened(client, run, consumer="trainer-1")
    assert ids(list(successor.read_pending(count=1))) == ["0.0.1.0", "0.0.2.0"]
    assert ids(list(stream.read_pending())) == ["0.0.1.0", "0.0.2.0"]


def test_acknowledged_entries_are_gone_and_acknowledging_again_changes_nothing(stream: WindowStream) -> None:
    stream.write(scored_window(0))
    stream.write(scored_window(1))
    (entry,) = stream.read(count=1, block_s=0.1)
    for _ in range(2):
        stream.acknowledge({entry.entry_id: "0.0.0.0"})
    stream.acknowledge({})
    assert stream.window_ids() == {"0.0.1.0"}
    assert list(stream.read_pending()) == []
    stream.write(scored_window(0))
    stream.acknowledge({entry.entry_id: "0.0.0.0"})
    assert stream.window_ids() == {"0.0.0.0", "0.0.1.0"}, "the id belongs to another entry now"


def test_backlog_counts_unread_and_pending(stream: WindowStream) -> None:
    assert stream.backlog() == Backlog(unread=0, pending=0)
    for position in range(3):
        stream.write(scored_window(position))
    entries = stream.read(count=2, block_s=0.1)
    assert stream.backlog() == Backlog(unread=1, pending=2)
    stream.acknowledge({entries[0].entry_id: "0.0.0.0"})
    assert stream.backlog() == Backlog(unread=1, pending=1)


def test_more_entries_than_one_script_takes_are_acknowledged(
    client: redis.Redis, run: str, stream: WindowStream
) -> None:
    entries = {stream.append(f"0.0.{position}.0", b"", lease=None): f"0.0.{position}.0" for position in range(2500)}
    stream.acknowledge(dict(list(entries.items())[:-1]))
    assert stream.window_ids() == {"0.0.2499.0"}
    assert client.xlen(windows_key(run)) == 1


def test_ids_are_those_on_the_stream_without_reading_it(client: redis.Redis, stream: WindowStream) -> None:
    for position in range(7):
        stream.write(scored_window(position, text=os.urandom(50_000).hex()))
    stream.read(count=2, block_s=0.1)
    before = client.info("stats")["total_net_output_bytes"]
    assert stream.window_ids() == {f"0.0.{position}.0" for position in range(7)}
    assert client.info("stats")["total_net_output_bytes"] - before < 10_000


def test_a_write_that_is_repeated_is_there_once(stream: WindowStream) -> None:
    assert stream.write(scored_window(0)) == stream.write(scored_window(0))
    assert stream.backlog() == Backlog(unread=1, pending=0)


def test_only_the_newest_lease_of_a_part_writes(client: redis.Redis, run: str) -> None:
    stream, coordination = opened(client, run), Coordination(client, run)
    first, second = Lease(0, "a", 1), Lease(0, "b", 2)
    with pytest.raises(FencedError, match="another collector has taken part 0"):
        stream.write(scored_window(0), first)
    for lease in (first, second):
        client.delete(lease_key(run, 0))
        coordination.acquire_leases([0], lease.owner, room=1, lease_s=30)
        assert coordination.raise_fence(lease)
        stream.write(scored_window(lease.epoch), lease)
    for position in (1, 3):  # the one that is there, and a new one
        with pytest.raises(FencedError, match=rf"0\.0\.{position}\.0 is not written"):
            stream.write(scored_window(position), first)
    assert stream.window_ids() == {"0.0.1.0", "0.0.2.0"}


def test_ids_of_a_stream_that_was_deleted_are_forgotten(client: redis.Redis, run: str, stream: WindowStream) -> None:
    stream.write(scored_window(0))
    client.delete(windows_key(run))
    stream.create()
    assert stream.window_ids() == set()
    stream.write(scored_window(0))
    assert ids(stream.read(count=5, block_s=0.1)) == ["0.0.0.0"]


@pytest.mark.parametrize(
    ("fields", "named"), [({"schema": "7"}, "of schema 7"), ({}, "of an older version, without a schema number")]
)
def test_entries_of_another_version_stop_the_reader_and_stay(
    client: redis.Redis, run: str, fields: dict[Any, Any], named: str
) -> None:
    stream = opened(client, run)
    client.xadd(windows_key(run), fields | {"id": "0.0.9.0", "body": encode(scored_window(9))})
    asked = [
        lambda: stream.read(count=1, block_s=0.1),
        lambda: list(stream.read_pending()),
        stream.create,
        stream.window_ids,
    ]
    for ask in asked:
        with pytest.raises(StreamSchemaError, match=rf"windows has entries {named}.* reads schema 3: let the version"):
            ask()
    assert stream.backlog() == Backlog(unread=0, pending=1)


def test_the_form_of_schema_3() -> None:
    """Where this fails because a record has changed, raise `SCHEMA` with it: other versions can't read the new form."""
    body = zstandard.ZstdDecompressor().decompress(encode(scored_window()), max_output_size=1_000_000)
    candidate = {"kinds": ["original"], "token_ids": [3, 4], "text": " river", "weight_version": None}
    rollout = {"kinds": ["rollout"], "token_ids": [5], "text": " hill", "weight_version": 2, "finish_reason": "stop"}
    judgement = {"rewards": [0.75, 0.25], "scores": {"quality": [0.75, 0.25]}, "reasoning": "", "num_calls": 2}
    no_comparisons: dict[str, object] = {"criteria": [], "rows": b""}
    chunk = {
        "start": 2,
        "candidates": [candidate | {"finish_reason": "source"}, rollout],
        "judgement": judgement | {"num_failures": 0, "fingerprint": "f", "barred": [], "comparisons": no_comparisons},
    }
    assert (SCHEMA, msgpack.unpackb(body)) == (
        3,
        {
            "run_id": "run",
            "key": {"part": 0, "epoch": 0, "position": 0, "window": 0},
            "source_id": "d0",
            "token_ids": [1, 2, 3, 4],
            "chunks": [chunk],
            "dropped_chunks": [],
            "read_at": 1.5,
            "scored_at": 2.5,
            "seconds": {},
            "probes": [],
        },
    )


def test_an_entry_that_is_no_document_is_broken_and_does_not_stop_reading(
    client: redis.Redis, run: str, stream: WindowStream
) -> None:
    client.xadd(windows_key(run), {"id": "0.0.9.0", "schema": SCHEMA, "body": b"no zstd"})
    client.xadd(windows_key(run), {"schema": SCHEMA, "other": b"x"})
    stream.write(scored_window(1))
    broken, nameless, good = stream.read(count=5, block_s=0.1)
    assert isinstance(broken, BrokenEntry)
    assert isinstance(nameless, BrokenEntry)
    assert (broken.window_id, nameless.window_id) == ("0.0.9.0", "")
    assert "not a scored window" in broken.reason
    assert isinstance(good, StreamEntry)


def test_documents_written_before_the_group_was_made_are_read(client: redis.Redis, run: str) -> None:
    stream = WindowStream(client, run)
    stream.write(scored_window(0))
    stream.create()
    stream.create()
    assert ids(stream.read(count=1, block_s=0.1)) == ["0.0.0.0"]


def test_decode_refuses_a_record_with_unknown_keys() -> None:
    packed = scored_window().model_dump(mode="python")
    packed["chunks"][0]["judgement"]["comparisons"] = pack(())
    assert decode(compressed(packed)) == scored_window()
    with pytest.raises(StreamError, match=r"not a scored window: .*\n.*surplus\n.*not permitted"):
        decode(compressed(packed | {"surplus": 1}))


def compressed(record: dict[str, Any]) -> bytes:
    return zstandard.ZstdCompressor().compress(msgpack.packb(record))


def test_the_stream_survives_a_killed_redis(tmp_path: Path) -> None:
    server = RedisProcess(tmp_path)
    server.start()
    stream = opened(connect(server.url, timeout_s=1), "run")
    stream.write(scored_window(0))
    stream.write(scored_window(1))
    stream.read(count=1, block_s=0.1)
    server.stop()
    with pytest.raises(StreamError, match=re.escape("Redis: ")):
        stream.write(scored_window(2))
    server.start()
    assert stream.backlog() == Backlog(unread=1, pending=1)
    assert ids(list(stream.read_pending())) == ["0.0.0.0"]
    server.stop()


def test_reading_without_a_group_says_so(client: redis.Redis, run: str) -> None:
    with pytest.raises(StreamError, match=GROUP):
        WindowStream(client, run).read(count=1, block_s=0.01)


def test_entries_are_read_off_the_stream_itself(client: redis.Redis, run: str, stream: WindowStream) -> None:
    written = {stream.write(scored_window(number)): f"0.0.{number}.0" for number in range(5)}
    assert stream.entries(count=2) == written
    lost = next(iter(written))
    client.xdel(windows_key(run), lost)
    assert stream.entries() == {entry: window for entry, window in written.items() if entry != lost}
