"""The Redis stream of scored documents: collectors write, the trainer's consumer group reads.

    collector --write--> stream --read--> trainer --acknowledge (after the checkpoint)--> entry deleted

At-least-once: an entry stays until it is acknowledged, and after a crash `read_pending` gives back what was
delivered but never acknowledged. Nothing is trimmed. Entries carry the document id in the clear and the record
as zstd-compressed msgpack. Commands stay within Redis 6.2.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgpack
import redis
import zstandard
from pydantic import ValidationError

from shared.errors import SettingsError, StreamError
from shared.limits import MAX_ENTRY_BYTES
from shared.records import ScoredDocument

GROUP = "trainer"


def documents_key(run: str) -> str:
    return f"headwater:{run}:documents"


def weights_key(run: str) -> str:
    """String: the latest announced weight version."""
    return f"headwater:{run}:weights"


def replica_key(run: str, replica: str) -> str:
    """String with expiry: the weight version that a living rollout replica serves."""
    return f"headwater:{run}:replica:{replica}"


def replicas_key(run: str) -> str:
    """Set: names of rollout replicas, some of which may be dead."""
    return f"headwater:{run}:replicas"


def lease_key(run: str, part: int) -> str:
    """String with expiry: which collector holds this part of the source."""
    return f"headwater:{run}:lease:{part}"


def exhausted_key(run: str) -> str:
    """Hash: by part of the source that has no more documents, what that was true for (`Ledger.extent`)."""
    return f"headwater:{run}:exhausted-parts"


def trainer_key(run: str) -> str:
    """Hash: step, policy_version, state (`training`, `finished`) of the trainer."""
    return f"headwater:{run}:trainer"


@dataclass(frozen=True)
class StreamEntry:
    """A document as delivered: acknowledge it by `entry_id`."""

    entry_id: str
    document: ScoredDocument


@dataclass(frozen=True)
class BrokenEntry:
    """An entry that can't be decoded: drop it with its reason, then acknowledge it."""

    entry_id: str
    document_id: str
    reason: str


@dataclass(frozen=True)
class Backlog:
    """How much lies on the stream."""

    unread: int
    """Written, not yet delivered to the trainer."""
    pending: int
    """Delivered, not yet acknowledged."""


def encode(document: ScoredDocument) -> bytes:
    """zstd(msgpack) of the record; token ids dominate, so level 3 is enough. SettingsError for one that no reader
    would take."""
    packed = msgpack.packb(document.model_dump(mode="python"), use_bin_type=True)
    if len(packed) > MAX_ENTRY_BYTES:
        raise SettingsError(
            f"document {document.document_id} has {len(packed):,} bytes, an entry of the stream takes "
            f"{MAX_ENTRY_BYTES:,}: lower chunks.context_tokens or the schedule's num_rollouts"
        )
    return zstandard.ZstdCompressor(level=3).compress(packed)


def decode(body: bytes) -> ScoredDocument:
    """The record, or StreamError if the bytes are not one."""
    try:
        packed = zstandard.ZstdDecompressor().decompress(body, max_output_size=MAX_ENTRY_BYTES)
        return ScoredDocument.model_validate(msgpack.unpackb(packed))
    except (zstandard.ZstdError, ValueError, msgpack.UnpackException, ValidationError) as exc:
        raise StreamError(f"an entry on the stream is not a scored document: {exc}") from exc


class DocumentStream:
    """One run's stream, seen from either side. Blocking calls: use it from a thread in async code."""

    def __init__(self, client: redis.Redis, run: str, *, consumer: str = "trainer-0") -> None:
        self._client: Any = client  # redis-py types every answer as a union over sync and async
        self._key = documents_key(run)
        self._consumer = consumer

    def create(self) -> None:
        """Make stream and group if they are not there."""
        with translated():
            try:
                self._client.xgroup_create(self._key, GROUP, id="0", mkstream=True)
            except redis.ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    def write(self, document: ScoredDocument) -> str:
        """Append; returns the entry id once Redis has it."""
        with translated():
            entry = self._client.xadd(self._key, {b"id": document.document_id.encode(), b"body": encode(document)})
            return _text(entry)

    def read(self, *, count: int, block_s: float) -> list[StreamEntry | BrokenEntry]:
        """Up to `count` new entries, waiting at most `block_s` for the first; an empty list means none came."""
        with translated():
            answer = self._client.xreadgroup(
                GROUP, self._consumer, {self._key: ">"}, count=count, block=max(1, int(block_s * 1000))
            )
        return [_entry(entry_id, fields) for _, entries in answer or [] for entry_id, fields in entries]

    def read_pending(self, *, count: int = 64) -> Iterator[StreamEntry | BrokenEntry]:
        """What was delivered but never acknowledged, oldest first. Takes over from consumers that are gone."""
        cursor = "0-0"
        while True:
            with translated():
                cursor_bytes, entries, *_ = self._client.xautoclaim(
                    self._key, GROUP, self._consumer, min_idle_time=0, start_id=cursor, count=count
                )
            yield from (_entry(entry_id, fields) for entry_id, fields in entries if fields)
            cursor = _text(cursor_bytes)
            if cursor == "0-0":
                return

    def acknowledge(self, entry_ids: Iterable[str]) -> None:
        """Acknowledge and delete. Call it only when what the entries became is on disk."""
        ids = list(entry_ids)
        if not ids:
            return
        with translated():
            self._client.pipeline(transaction=True).xack(self._key, GROUP, *ids).xdel(self._key, *ids).execute()

    def backlog(self) -> Backlog:
        with translated():
            length = int(self._client.xlen(self._key))
            pending = int(self._client.xpending(self._key, GROUP)["pending"]) if length else 0
        return Backlog(unread=max(0, length - pending), pending=pending)

    def document_ids(self, *, count: int = 1000) -> set[str]:
        """Ids of all documents on the stream, delivered or not."""
        found: set[str] = set()
        start = "-"
        while True:
            with translated():
                entries = self._client.xrange(self._key, min=start, max="+", count=count)
            found.update(_text(fields[b"id"]) for _, fields in entries)
            if len(entries) < count:
                return found
            start = f"({_text(entries[-1][0])}"


def _entry(entry_id: bytes, fields: dict[bytes, bytes]) -> StreamEntry | BrokenEntry:
    try:
        return StreamEntry(_text(entry_id), decode(fields[b"body"]))
    except (StreamError, KeyError) as exc:
        return BrokenEntry(_text(entry_id), _text(fields.get(b"id", b"")), str(exc))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """A client whose every wait is bounded; it reconnects by itself after a Redis restart."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s + 5.0,
        socket_connect_timeout=timeout_s,
        health_check_interval=15,
    )


@contextmanager
def translated() -> Iterator[None]:
    """Redis errors as StreamError."""
    try:
        yield
    except redis.RedisError as exc:
        raise StreamError(f"Redis: {exc}") from exc
