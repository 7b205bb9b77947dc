"""The small facts that processes of one run tell each other through Redis, beside the document stream.

    trainer   -> rollout      `announce_weights`: the newest version in the weight store
    rollout   -> trainer      `report_replica`: which weight version each living replica serves, with expiry
    trainer   -> collector    `report_trainer`: step, policy version, whether the run is finished
    collector -> collectors   leases on parts of the source, with expiry
    collector -> trainer      `mark_exhausted`: a part of the source has no more documents

Blocking calls, each bounded by the client's timeouts: use it from a thread in async code.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import redis

from shared.stream import (
    exhausted_key,
    lease_key,
    replica_key,
    replicas_key,
    trainer_key,
    translated,
    weights_key,
)

TrainerState = Literal["training", "finished"]

_RENEW = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('pexpire', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"


@dataclass(frozen=True)
class TrainerReport:
    """How far the trainer is."""

    step: int
    policy_version: int
    state: TrainerState


@dataclass(frozen=True)
class AnnouncedWeights:
    """The weight version that replicas are to serve."""

    version: int
    epoch: str = ""
    """The lineage that the number belongs to (shared/weight_store.py)."""


class Coordination:
    """One run's facts in Redis. Raises StreamError when Redis can't be reached."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self._client: Any = client
        self._run = run

    def announce_weights(self, version: int, *, epoch: str = "") -> None:
        with translated():
            self._client.set(weights_key(self._run), f"{version} {epoch}")

    def announced_weights(self) -> AnnouncedWeights | None:
        """None until the trainer has announced some."""
        with translated():
            value = self._client.get(weights_key(self._run))
        if value is None:
            return None
        version, _, epoch = value.decode().partition(" ")
        return AnnouncedWeights(int(version), epoch)

    def announced_version(self) -> int | None:
        announced = self.announced_weights()
        return None if announced is None else announced.version

    def report_replica(self, replica: str, version: int, *, lifetime_s: float) -> None:
        """It lives and serves `version`; unless it says so again within `lifetime_s`, it counts as dead."""
        with translated():
            self._client.set(replica_key(self._run, replica), version, px=int(lifetime_s * 1000))
            self._client.sadd(replicas_key(self._run), replica)

    def forget_replica(self, replica: str) -> None:
        """It stops in good order."""
        with translated():
            self._client.delete(replica_key(self._run, replica))
            self._client.srem(replicas_key(self._run), replica)

    def live_replicas(self) -> dict[str, int]:
        """The weight version that each living replica serves."""
        with translated():
            names = sorted(name.decode() for name in self._client.smembers(replicas_key(self._run)))
            if not names:
                return {}
            versions = self._client.mget([replica_key(self._run, name) for name in names])
            dead = [name for name, version in zip(names, versions, strict=True) if version is None]
            if dead:
                # one that comes back at this moment is in again with its next heartbeat
                self._client.srem(replicas_key(self._run), *dead)
        return {name: int(version) for name, version in zip(names, versions, strict=True) if version is not None}

    def report_trainer(self, report: TrainerReport) -> None:
        with translated():
            self._client.hset(
                trainer_key(self._run),
                mapping={"step": report.step, "policy_version": report.policy_version, "state": report.state},
            )

    def trainer_report(self) -> TrainerReport | None:
        """None until the trainer has reported."""
        with translated():
            fields = self._client.hgetall(trainer_key(self._run))
        if not fields:
            return None
        return TrainerReport(
            step=int(fields[b"step"]),
            policy_version=int(fields[b"policy_version"]),
            state=cast(TrainerState, fields[b"state"].decode()),
        )

    def acquire_lease(self, part: int, owner: str, *, lease_s: float) -> bool:
        """True if `owner` now holds the part (it may have held it before)."""
        key, milliseconds = lease_key(self._run, part), int(lease_s * 1000)
        with translated():
            if self._client.set(key, owner, nx=True, px=milliseconds):
                return True
            return bool(self._client.eval(_RENEW, 1, key, owner, milliseconds))

    def renew_lease(self, part: int, owner: str, *, lease_s: float) -> bool:
        """False if the lease was lost: stop working on the part at once."""
        with translated():
            return bool(self._client.eval(_RENEW, 1, lease_key(self._run, part), owner, int(lease_s * 1000)))

    def release_lease(self, part: int, owner: str) -> None:
        with translated():
            self._client.eval(_RELEASE, 1, lease_key(self._run, part), owner)

    def mark_exhausted(self, part: int) -> None:
        """The part has no more documents, and all it had are on the stream or dropped."""
        with translated():
            self._client.sadd(exhausted_key(self._run), part)

    def source_exhausted(self, *, num_parts: int) -> bool:
        with translated():
            return int(self._client.scard(exhausted_key(self._run))) >= num_parts
