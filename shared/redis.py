"""Redis: the client, its errors, and every key of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from shared.errors import StreamError


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


def windows_key(run: str) -> str:
    return f"headwater:{run}:windows"


def window_ids_key(run: str) -> str:
    """Hash: window id -> entry id of every window on the stream."""
    return f"headwater:{run}:windows:ids"


def fences_key(run: str) -> str:
    """Hash: part -> fencing number of the collector that holds it (shared/records.py)."""
    return f"headwater:{run}:fences"


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
    """Hash: by part of the source that has no more windows, what that was true for (`Run.extent`)."""
    return f"headwater:{run}:exhausted-parts"


def trainer_key(run: str) -> str:
    """Hash: step, weight_version, state (`training`, `finished`) of the trainer."""
    return f"headwater:{run}:trainer"
