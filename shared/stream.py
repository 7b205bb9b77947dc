"""The Redis stream of scored windows: collectors write, the trainer's consumer group reads.

    collector --write--> stream --read--> trainer --acknowledge (after the checkpoint)--> entry deleted

At-least-once: an entry stays until it is acknowledged, and after a crash `read_pending` gives back what was
delivered but never acknowledged. Nothing is trimmed. An entry carries the window id and the number of its schema in
the clear, and the record as zstd-compressed msgpack.

Beside the stream lies a hash of the window ids on it. Scripts keep the two together: one that writes an entry only
if its id is not there, so that a write may be repeated until Redis has answered, and one that acknowledges it and
takes its id away. Commands stay within Redis 6.2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import redis
import zstandard
from pydantic import ValidationError

from shared.errors import FencedError, SettingsError, StreamError, StreamSchemaError
from shared.limits import MAX_ENTRY_BYTES
from shared.records import Lease, ScoredWindow
from shared.redis import fences_key, translated, window_ids_key, windows_key

GROUP = "trainer"
SCHEMA = 1
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
# KEYS stream, ids; ARGV group, then entry id and window id of each
_ACKNOWLEDGE = """
for i = 2, #ARGV, 2 do
  redis.call('xack', KEYS[1], ARGV[1], ARGV[i])
  redis.call('xdel', KEYS[1], ARGV[i])
  if redis.call('hget', KEYS[2], ARGV[i + 1]) == ARGV[i] then redis.call('hdel', KEYS[2], ARGV[i + 1]) end
end
"""
# KEYS stream, ids. The schema of the oldest entry ('' if it has none), or nothing; then ids of no entries go too.
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
# KEYS stream; ARGV first id, how many. Entry id and window id of each: bodies stay where they are.
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


@dataclass(frozen=True)
class StreamEntry:
    """A window as delivered: acknowledge it by `entry_id`."""

    entry_id: str
    window: ScoredWindow

    @property
    def window_id(self) -> str:
        return self.window.window_id


@dataclass(frozen=True)
class BrokenEntry:
    """An entry that can't be decoded: drop it with its reason, then acknowledge it."""

    entry_id: str
    window_id: str
    reason: str


@dataclass(frozen=True)
class Backlog:
    """How much lies on the stream."""

    unread: int
    """Written, not yet delivered to the trainer."""
    pending: int
    """Delivered, not yet acknowledged."""


def encode(window: ScoredWindow) -> bytes:
    """zstd(msgpack) of the record; token ids dominate, so level 3 is enough. SettingsError for one that no reader
    would take."""
    packed = msgpack.packb(window.model_dump(mode="python"), use_bin_type=True)
    if len(packed) > MAX_ENTRY_BYTES:
        raise SettingsError(
            f"window {window.window_id} has {len(packed):,} bytes, an entry of the stream takes "
            f"{MAX_ENTRY_BYTES:,}: lower chunks.context_tokens or the schedule's num_rollouts"
        )
    return zstandard.ZstdCompressor(level=3).compress(packed)


def decode(body: bytes) -> ScoredWindow:
    """The record, or StreamError if the bytes are not one."""
    try:
        packed = zstandard.ZstdDecompressor().decompress(body, max_output_size=MAX_ENTRY_BYTES)
        return ScoredWindow.model_validate(msgpack.unpackb(packed))
    except (zstandard.ZstdError, ValueError, msgpack.UnpackException, ValidationError) as exc:
        raise StreamError(f"an entry on the stream is not a scored window: {exc}") from exc


class WindowStream:
    """One run's stream, seen from either side. Blocking calls: use it from a thread in async code."""

    def __init__(self, client: redis.Redis, run: str, *, consumer: str = "trainer-0") -> None:
        self._client: Any = client  # redis-py types every answer as a union over sync and async
        self._key = windows_key(run)
        self._ids_key = window_ids_key(run)
        self._fences_key = fences_key(run)
        self._consumer = consumer

    def create(self) -> None:
        """Make stream and group if they are not there. Raises StreamSchemaError if another version wrote the stream."""
        self._refuse_unknown_schema()
        with translated():
            try:
                self._client.xgroup_create(self._key, GROUP, id="0", mkstream=True)
            except redis.ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    def write(self, window: ScoredWindow, lease: Lease | None = None) -> str:
        """Append, unless the window is on the stream; returns the entry id once Redis has it.

        Raises FencedError if another collector has taken the part since `lease`; None is a writer that holds no part.
        """
        return self.append(window.window_id, encode(window), lease=lease)

    def append(self, window_id: str, body: bytes, *, lease: Lease | None) -> str:
        """`write` of a window that is encoded already. Repeating it changes nothing."""
        part, epoch = (lease.part, lease.epoch) if lease else ("", "")
        keys = (self._key, self._ids_key, self._fences_key)
        with translated():
            entry = self._client.eval(_WRITE, len(keys), *keys, part, epoch, window_id, SCHEMA, body)
        if entry is None:
            raise FencedError(
                f"window {window_id} is not written: another collector has taken part {part} since, or Redis has "
                "lost its data"
            )
        return _text(entry)

    def read(self, *, count: int, block_s: float) -> list[StreamEntry | BrokenEntry]:
        """Up to `count` new entries, waiting at most `block_s` for the first; an empty list means none came.

        Raises StreamSchemaError for an entry of another version; it stays pending.
        """
        with translated():
            answer = self._client.xreadgroup(
                GROUP, self._consumer, {self._key: ">"}, count=count, block=max(1, int(block_s * 1000))
            )
        return [self._entry(entry_id, fields) for _, entries in answer or [] for entry_id, fields in entries]

    def read_pending(self, *, count: int = 64) -> Iterator[StreamEntry | BrokenEntry]:
        """What was delivered but never acknowledged, oldest first. Takes over from consumers that are gone."""
        cursor = "0-0"
        while True:
            with translated():
                cursor_bytes, entries, *_ = self._client.xautoclaim(
                    self._key, GROUP, self._consumer, min_idle_time=0, start_id=cursor, count=count
                )
            yield from (self._entry(entry_id, fields) for entry_id, fields in entries if fields)
            cursor = _text(cursor_bytes)
            if cursor == "0-0":
                return

    def acknowledge(self, entries: Mapping[str, str]) -> None:
        """Acknowledge and delete `{entry id: window id}`. Call it only when what they became is on disk."""
        pairs = list(entries.items())
        for start in range(0, len(pairs), _ACKNOWLEDGED_AT_ONCE):
            words = [word for pair in pairs[start : start + _ACKNOWLEDGED_AT_ONCE] for word in pair]
            with translated():
                self._client.eval(_ACKNOWLEDGE, 2, self._key, self._ids_key, GROUP, *words)

    def backlog(self) -> Backlog:
        with translated():
            length = int(self._client.xlen(self._key))
            pending = int(self._client.xpending(self._key, GROUP)["pending"]) if length else 0
        return Backlog(unread=max(0, length - pending), pending=pending)

    def window_ids(self) -> set[str]:
        """Ids of all windows on the stream, delivered or not. Raises StreamSchemaError as `create` does."""
        self._refuse_unknown_schema()
        with translated():
            return {_text(window_id) for window_id in self._client.hkeys(self._ids_key)}

    def entries(self, *, count: int = 100) -> dict[str, str]:
        """Document id by entry id, off the stream itself: what `headwater audit` compares with the ids kept beside it.
        Raises StreamSchemaError as `create` does."""
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

    def _entry(self, entry_id: bytes, fields: dict[bytes, bytes]) -> StreamEntry | BrokenEntry:
        self._check_schema(fields.get(b"schema", b""))
        try:
            return StreamEntry(_text(entry_id), decode(fields[b"body"]))
        except (StreamError, KeyError) as exc:
            return BrokenEntry(_text(entry_id), _text(fields.get(b"id", b"")), str(exc))

    def _check_schema(self, schema: bytes) -> None:
        """An entry of another version is whole, only not for us: it must not be dropped as broken."""
        if _text(schema) != str(SCHEMA):
            found = f"of schema {_text(schema)}" if schema else "of an older version, without a schema number,"
            raise StreamSchemaError(
                f"the stream {self._key} has entries {found} and this version reads schema {SCHEMA}: let the version "
                "that wrote them train them, or delete this Redis key and their windows are scored again"
            )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
