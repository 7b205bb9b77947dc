"""Redis: the client, its errors, and every key of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from shared.errors import SettingsError, StreamError
from shared.settings import RedisSettings


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """A client whose every wait is bounded; it reconnects by itself after a Redis restart."""
    return redis.Redis.from_url(
        url, socket_timeout=timeout_s + 5.0, socket_connect_timeout=timeout_s, health_check_interval=15
    )


def require_url(settings: RedisSettings) -> None:
    """SettingsError if it is empty: only `headwater run` can start a Redis of its own."""
    if not settings.url:
        raise SettingsError(
            "redis.url is empty: start with `headwater run`, or give --redis.url redis://127.0.0.1:6379"
        )


@contextmanager
def translated() -> Iterator[None]:
    """Redis errors as StreamError."""
    try:
        yield
    except redis.RedisError as exc:
        raise StreamError(f"Redis: {exc}") from exc


windows_key = "headwater:{}:windows".format
"""Stream of scored windows. This and the others by the name of the run."""
window_ids_key = "headwater:{}:windows:ids".format
"""Hash: window id -> entry id of every window on the stream."""
fences_key = "headwater:{}:fences".format
"""Hash: part -> fencing number of the collector that holds it (shared/records.py)."""
weights_key = "headwater:{}:weights".format
"""String: the latest announced weight version."""
replica_key = "headwater:{}:replica:{}".format
"""String with expiry, by run and replica: the weight version that a living replica serves."""
replicas_key = "headwater:{}:replicas".format
"""Set: names of rollout replicas, some of which may be dead."""
lease_key = "headwater:{}:lease:{}".format
"""String with expiry, by run and part of the source: which collector holds it."""
exhausted_key = "headwater:{}:exhausted-parts".format
"""Hash: by part of the source that has no more windows, what that was true for (`Run.extent`)."""
trainer_key = "headwater:{}:trainer".format
"""Hash: step, weight_version, state (`training`, `finished`) of the trainer."""
