"""The Redis stream of scored windows: collectors write, the trainer's consumer group reads.

    collector --write--> stream --read--> trainer --acknowledge (after the checkpoint)--> entry deleted

    stream = WindowStream(client, "web")
    stream.create()
    stream.write(window)
    for entry in stream.read(count=1, block_s=1.0):
        stream.acknowledge({entry.entry_id: entry.window_id})

Delivery is at least once: after a crash `read_pending` returns what was delivered but not acknowledged. Nothing is
trimmed. An entry has a window id, the number of its schema, and the record as zstd-compressed msgpack in which
comparisons are packed (shared/comparisons.py).

A hash holds the ids of the windows on the stream. One script writes an entry unless its id is there, so a write may be
repeated; another acknowledges an entry and deletes its id. Redis 6.2 is enough.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import redis
import zstandard

from shared.comparisons import pack, unpack
from shared.errors import FencedError, SettingsError, StreamError, StreamSchemaError
from shared.limits import MAX_ENTRY_BYTES
from shared.records import Lease, ScoredWindow
from shared.redis import fences_key, translated, window_ids_key, windows_key

GROUP = "trainer"
SCHEMA = 3
"""Of the record in an entry. Raise it when a `ScoredWindow` changes so that another version can't read it."""

# KEYS stream, ids, fences; ARGV part, lease epoch ('' without a lease), window id, schema, body
_WRITE = """
if ARGV[2] ~= '' and redis.call('hget', KEYS[3], ARGV[1]) ~= ARGV[2] then return false end
local entry = redis.call('hget', KEYS[2], ARGV[3])
if not entry then
  entry = redis.call('xadd', KEYS[1], '*', 'id', ARGV[3], 'schema', ARGV[4], 'body', ARGV[5])
  redis.call('hset', KEYS[2], ARGV[3], entry)
end
return entry
"""
# What the trainer's scripts begin with. KEYS stream, ids, fences; ARGV group, part, lease epoch ('' without a lease)
_UNLESS_FENCED = "if ARGV[3] ~= '' and redis.call('hget', KEYS[3], ARGV[2]) ~= ARGV[3] then return false end "
# ARGV further: consumer, how many
_READ = (
    _UNLESS_FENCED
    + """
local answer = redis.call('xreadgroup', 'GROUP', ARGV[1], ARGV[4], 'COUNT', ARGV[5], 'STREAMS', KEYS[1], '>')
return answer and answer[1][2] or {}
"""
)
# ARGV further: consumer, how many, first id. The next id, and the entries
_CLAIM = _UNLESS_FENCED + "return redis.call('xautoclaim', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[6], 'COUNT', ARGV[5])"
# ARGV further: entry id and window id of each
_ACKNOWLEDGE = (
    _UNLESS_FENCED
    + """
for i = 4, #ARGV, 2 do
  redis.call('xack', KEYS[1], ARGV[1], ARGV[i])
  redis.call('xdel', KEYS[1], ARGV[i])
  if redis.call('hget', KEYS[2], ARGV[i + 1]) == ARGV[i] then redis.call('hdel', KEYS[2], ARGV[i + 1]) end
end
return {}
"""
)
# KEYS stream, ids. The schema of the oldest entry ('' if it has none). Of an empty stream nothing; ids are deleted.
_OLDEST_SCHEMA = """
local oldest = redis.call('xrange', KEYS[1], '-', '+', 'COUNT', 1)[1]
if not oldest then
  redis.call('del', KEYS[2])
  return false
end
for i = 1, #oldest[2], 2 do
  if oldest[2][i] == 'schema' then return oldest[2][i + 1] end
end
return ''
"""
# KEYS stream; ARGV first id, how many. Entry id and window id of each, without bodies.
_ENTRIES = """
local found = {}
for _, entry in ipairs(redis.call('xrange', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
  local window = ''
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'id' then window = entry[2][i + 1] end
  end
  found[#found + 1] = entry[1]
  found[#found + 1] = window
end
return found
"""
_ACKNOWLEDGED_AT_ONCE = 1000
_COMPARISONS = {"chunks": {"__all__": {"judgement": {"comparisons"}}}}
_POLL_S = 0.05
"""Between two looks for new entries: a script, which checks the lease and reads at one moment, can't wait."""


@dataclass(frozen=True)
class StreamEntry:
    entry_id: str
    window: ScoredWindow

    @property
    def window_id(self) -> str:
        return self.window.window_id


@dataclass(frozen=True)
class BrokenEntry:
    """It can't be decoded: drop it with the reason, then acknowledge it."""

    entry_id: str
    window_id: str
    reason: str


@dataclass(frozen=True)
class Backlog:
    """Windows not yet delivered to the trainer, and those delivered but not acknowledged."""

    unread: int
    pending: int


def encode(window: ScoredWindow) -> bytes:
    """zstd(msgpack) of the record. SettingsError if it is larger than readers accept."""
    packed = msgpack.packb(_fields(window), use_bin_type=True)
    if len(packed) > MAX_ENTRY_BYTES:
        raise SettingsError(
            f"window {window.window_id} has {len(packed):,} bytes, an entry of the stream takes "
            f"{MAX_ENTRY_BYTES:,}: lower chunks.context_tokens or the schedule's num_rollouts"
        )
    return zstandard.ZstdCompressor(level=3).compress(packed)


def decode(body: bytes) -> ScoredWindow:
    """Raises StreamError if the bytes are not a record."""
    try:
        packed = zstandard.ZstdDecompressor().decompress(body, max_output_size=MAX_ENTRY_BYTES)
        fields = msgpack.unpackb(packed)
        for judgement in filter(None, (chunk.get("judgement") for chunk in fields.get("chunks", ()))):
            judgement["comparisons"] = unpack(judgement["comparisons"])
        return ScoredWindow.model_validate(fields)
    except (zstandard.ZstdError, ValueError, LookupError, AttributeError, TypeError, msgpack.UnpackException) as exc:
        raise StreamError(f"an entry on the stream is not a scored window: {exc}") from exc


def _fields(window: ScoredWindow) -> dict[str, Any]:
    fields = window.model_dump(mode="python", exclude=_COMPARISONS)
    for chunk, its_fields in zip(window.chunks, fields["chunks"], strict=True):
        if chunk.judgement:
            its_fields["judgement"]["comparisons"] = pack(chunk.judgement.comparisons)
    return fields


class WindowStream:
    """One run's stream, for writer and reader. Blocking: use it from a thread in async code.

    `lease` is the trainer's: reading and acknowledging raise FencedError, and change nothing, once another trainer has
    taken over. Collectors give a lease with each write.
    """

    def __init__(
        self, client: redis.Redis, run: str, *, consumer: str = "trainer-0", lease: Lease | None = None
    ) -> None:
        self._client: Any = client  # redis-py types every answer as a union over sync and async
        self._key = windows_key(run)
        self._ids_key = window_ids_key(run)
        self._fences_key = fences_key(run)
        self._consumer = consumer
        self._lease = lease

    def create(self) -> None:
        """Create stream and group unless they exist. Raises StreamSchemaError if another version wrote the stream."""
        self._refuse_unknown_schema()
        with translated():
            try:
                self._client.xgroup_create(self._key, GROUP, id="0", mkstream=True)
            except redis.ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    def write(self, window: ScoredWindow, lease: Lease | None = None) -> str:
        """Append the window unless it is on the stream; returns the entry id. FencedError if another collector has
        taken the part since `lease`."""
        return self.append(window.window_id, encode(window), lease=lease)

    def append(self, window_id: str, body: bytes, *, lease: Lease | None) -> str:
        """`write` of an encoded window. Repeating it changes nothing."""
        part, epoch = (lease.part, lease.epoch) if lease else ("", "")
        keys = (self._key, self._ids_key, self._fences_key)
        with translated():
            entry = self._client.eval(_WRITE, len(keys), *keys, part, epoch, window_id, SCHEMA, body)
        if entry is None:
            reason = f"another collector has taken part {part} since, or Redis has lost its data"
            raise FencedError(f"window {window_id} is not written: {reason}")
        return _text(entry)

    def read(self, *, count: int, block_s: float) -> list[StreamEntry | BrokenEntry]:
        """Up to `count` new entries; an empty list if none came within `block_s`. Raises StreamSchemaError for an entry
        of another version; it stays pending."""
        until = time.monotonic() + block_s
        while not (entries := self._eval(_READ, self._consumer, count)) and time.monotonic() < until:
            time.sleep(_POLL_S)
        return [self._entry(entry_id, fields) for entry_id, fields in entries]

    def read_pending(self, *, count: int = 64) -> Iterator[StreamEntry | BrokenEntry]:
        """What was delivered but not acknowledged, oldest first, also to consumers that are gone."""
        cursor = "0-0"
        while True:
            cursor_bytes, entries, *_ = self._eval(_CLAIM, self._consumer, count, cursor)
            yield from (self._entry(*entry) for entry in entries if entry and all(entry))  # others are deleted
            cursor = _text(cursor_bytes)
            if cursor == "0-0":
                return

    def acknowledge(self, entries: Mapping[str, str]) -> None:
        """Acknowledge and delete `{entry id: window id}`. Call it only once a checkpoint or the ledger has them."""
        pairs = list(entries.items())
        for start in range(0, len(pairs), _ACKNOWLEDGED_AT_ONCE):
            words = [word for pair in pairs[start : start + _ACKNOWLEDGED_AT_ONCE] for word in pair]
            self._eval(_ACKNOWLEDGE, *words)

    def _eval(self, script: str, *arguments: str | int) -> Any:
        """Run a script of the trainer's side. FencedError if another trainer has taken over."""
        part, epoch = (self._lease.part, self._lease.epoch) if self._lease else ("", "")
        keys = (self._key, self._ids_key, self._fences_key)
        with translated():
            answer = self._client.eval(script, len(keys), *keys, GROUP, part, epoch, *arguments)
        if answer is None and self._lease:
            raise FencedError(f"{self._lease.loss}, or Redis has lost its data: its stream is left alone")
        return answer

    def backlog(self) -> Backlog:
        with translated():
            length = int(self._client.xlen(self._key))
            pending = int(self._client.xpending(self._key, GROUP)["pending"]) if length else 0
        return Backlog(unread=max(0, length - pending), pending=pending)

    def window_ids(self) -> set[str]:
        """Of all windows on the stream, delivered or not. Raises StreamSchemaError as `create`."""
        self._refuse_unknown_schema()
        with translated():
            return {_text(window_id) for window_id in self._client.hkeys(self._ids_key)}

    def entries(self, *, count: int = 100) -> dict[str, str]:
        """Window id by entry id, from the stream itself. Raises StreamSchemaError as `create`."""
        self._refuse_unknown_schema()
        found: dict[str, str] = {}
        start = "-"
        while True:
            with translated():
                words = [_text(word) for word in self._client.eval(_ENTRIES, 1, self._key, start, count)]
            found.update(zip(words[::2], words[1::2], strict=True))
            if len(words) < 2 * count:
                return found
            start = f"({words[-2]}"

    def _refuse_unknown_schema(self) -> None:
        with translated():
            schema = self._client.eval(_OLDEST_SCHEMA, 2, self._key, self._ids_key)
        if schema is not None:
            self._check_schema(schema)

    def _entry(self, entry_id: bytes, words: list[bytes]) -> StreamEntry | BrokenEntry:
        """Of an entry's names and values in turn."""
        fields = dict(zip(words[::2], words[1::2], strict=True))
        self._check_schema(fields.get(b"schema", b""))
        try:
            return StreamEntry(_text(entry_id), decode(fields[b"body"]))
        except (StreamError, KeyError) as exc:
            return BrokenEntry(_text(entry_id), _text(fields.get(b"id", b"")), str(exc))

    def _check_schema(self, schema: bytes) -> None:
        if _text(schema) != str(SCHEMA):
            # not a BrokenEntry, which would be dropped
            found = f"of schema {_text(schema)}" if schema else "of an older version, without a schema number,"
            raise StreamSchemaError(
                f"the stream {self._key} has entries {found} and this version reads schema {SCHEMA}: let the version "
                "that wrote them train them, or delete this Redis key and their windows are scored again"
            )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
