"""Small facts that the processes of a run share through Redis, next to the stream of windows.

    trainer   -> rollout      `announce_weights`: the newest version in the weight store
    rollout   -> trainer      `report_replica`: which weight version each living replica serves, with expiry
    trainer   -> collector    `report_trainer`: step, weight version, whether the run is finished
    collector -> collectors   leases on parts of the source, with expiry, and fencing numbers (shared/records.py)
    trainer   -> trainers     the same for the run as a whole (trainer/lease.py)
    collector -> trainer      `mark_exhausted`: a part of the source has no more documents

    coordination = Coordination(client, "web")
    coordination.announce_weights(7, epoch=publisher.epoch)
    coordination.live_replicas()                            # {"gpu-1-8001": 6}

Calls block, at most for the client's timeouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import redis

from shared.errors import FencedError
from shared.records import Lease
from shared.redis import (
    exhausted_key,
    fences_key,
    lease_key,
    replica_key,
    replicas_key,
    trainer_key,
    translated,
    weights_key,
)

TrainerState = Literal["training", "finished"]

# KEYS leases; ARGV owner, milliseconds, how many to take at most. Indices of those taken, from 1.
_ACQUIRE = """
local taken = {}
for i, key in ipairs(KEYS) do
  if #taken >= tonumber(ARGV[3]) then break end
  if redis.call('set', key, ARGV[1], 'NX', 'PX', ARGV[2]) then taken[#taken + 1] = i end
end
return taken
"""
# KEYS fences, leases; ARGV owner, milliseconds, then part and lease epoch ('' before it is known) of each lease.
# Indices of those held. A lease that expired is renewed if its number is still the part's: nobody took the part.
_RENEW = """
local held = {}
for i = 2, #KEYS do
  local owner, epoch = redis.call('get', KEYS[i]), ARGV[2 * i]
  local free = not owner and epoch ~= '' and redis.call('hget', KEYS[1], ARGV[2 * i - 1]) == epoch
  if owner == ARGV[1] or free then
    redis.call('set', KEYS[i], ARGV[1], 'PX', ARGV[2])
    held[#held + 1] = i - 1
  end
end
return held
"""
# KEYS lease, fences; ARGV owner, part, lease epoch
_RAISE_FENCE = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('hset', KEYS[2], ARGV[2], ARGV[3])
return 1
"""
# KEYS fences, the key to write; ARGV part, lease epoch ('' without a lease), command and its arguments
_WRITE = """
if ARGV[2] ~= '' and redis.call('hget', KEYS[1], ARGV[1]) ~= ARGV[2] then return false end
redis.call(ARGV[3], KEYS[2], unpack(ARGV, 4))
return 1
"""
# KEYS fences, exhausted parts; ARGV part, lease epoch, extent
_MARK_EXHAUSTED = """
if redis.call('hget', KEYS[1], ARGV[1]) ~= ARGV[2] then return false end
return redis.call('hset', KEYS[2], ARGV[1], ARGV[3])
"""
_RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"


@dataclass(frozen=True)
class TrainerReport:
    step: int
    weight_version: int
    state: TrainerState


@dataclass(frozen=True)
class AnnouncedWeights:
    """What replicas should serve. Numbers are comparable within one epoch only (shared/weights/store.py)."""

    version: int
    epoch: str = ""


class Coordination:
    """One run's facts in Redis. Raises StreamError when Redis can't be reached.

    `lease` is the trainer's: its announcements and reports raise FencedError, and change nothing, once another trainer
    has taken over.
    """

    def __init__(self, client: redis.Redis, run: str, lease: Lease | None = None) -> None:
        self._client: Any = client
        self._run = run
        self._lease = lease

    def under(self, lease: Lease) -> "Coordination":
        """The same run, told by the trainer that holds `lease`."""
        return Coordination(self._client, self._run, lease)

    def announce_weights(self, version: int, *, epoch: str = "") -> None:
        self._write("set", weights_key(self._run), f"{version} {epoch}")

    def announced_weights(self) -> AnnouncedWeights | None:
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
        """It counts as dead unless it reports again within `lifetime_s`."""
        with translated():
            self._client.set(replica_key(self._run, replica), version, px=int(lifetime_s * 1000))
            self._client.sadd(replicas_key(self._run), replica)

    def forget_replica(self, replica: str) -> None:
        with translated():
            self._client.delete(replica_key(self._run, replica))
            self._client.srem(replicas_key(self._run), replica)

    def live_replicas(self) -> dict[str, int]:
        with translated():
            names = sorted(name.decode() for name in self._client.smembers(replicas_key(self._run)))
            if not names:
                return {}
            found = dict(zip(names, self._client.mget([replica_key(self._run, name) for name in names]), strict=True))
            if dead := [name for name, version in found.items() if version is None]:
                self._client.srem(replicas_key(self._run), *dead)  # one that returns now is added by its next heartbeat
        return {name: int(version) for name, version in found.items() if version is not None}

    def report_trainer(self, report: TrainerReport) -> None:
        words = [word for name, value in asdict(report).items() for word in (name, value)]
        self._write("hset", trainer_key(self._run), *words)

    def _write(self, command: str, key: str, *arguments: str | int) -> None:
        part, epoch = (self._lease.part, self._lease.epoch) if self._lease else ("", "")
        with translated():
            done = self._client.eval(_WRITE, 2, fences_key(self._run), key, part, epoch, command, *arguments)
        if done is None and self._lease:
            raise FencedError(f"{self._lease.loss}, or Redis has lost its data: {key} is not written")

    def trainer_report(self) -> TrainerReport | None:
        with translated():
            fields = self._client.hgetall(trainer_key(self._run))
        if not fields:
            return None
        state = cast(TrainerState, fields[b"state"].decode())
        return TrainerReport(int(fields[b"step"]), int(fields[b"weight_version"]), state)

    def acquire_leases(self, parts: Sequence[int], owner: str, *, room: int, lease_s: float) -> list[int]:
        """Lease up to `room` of the parts that nobody holds; returns them."""
        keys = [lease_key(self._run, part) for part in parts]
        with translated():
            taken = self._client.eval(_ACQUIRE, len(keys), *keys, owner, int(lease_s * 1000), room)
        return [parts[index - 1] for index in taken]

    def renew_leases(self, epochs: Mapping[int, int | None], owner: str, *, lease_s: float) -> set[int]:
        """The parts that `owner` still holds: stop working on the others at once.

        `epochs`: by part the fencing number, None before `raise_fence`. An expired lease is renewed if its number is
        still the part's: a long outage of Redis costs no work.
        """
        parts = list(epochs)
        keys = [fences_key(self._run), *(lease_key(self._run, part) for part in parts)]
        numbers = [word for part in parts for word in (part, "" if epochs[part] is None else epochs[part])]
        with translated():
            held = self._client.eval(_RENEW, len(keys), *keys, owner, int(lease_s * 1000), *numbers)
        return {parts[index - 1] for index in held}

    def lease_owner(self, part: int) -> str | None:
        with translated():
            owner = self._client.get(lease_key(self._run, part))
        return None if owner is None else owner.decode()

    def raise_fence(self, lease: Lease) -> bool:
        """From now on entries under another number are refused. False if the lease has expired."""
        keys = (lease_key(self._run, lease.part), fences_key(self._run))
        with translated():
            return bool(self._client.eval(_RAISE_FENCE, 2, *keys, lease.owner, lease.part, lease.epoch))

    def release_lease(self, part: int, owner: str) -> None:
        with translated():
            self._client.eval(_RELEASE, 1, lease_key(self._run, part), owner)

    def leased_parts(self, *, num_parts: int) -> set[int]:
        with translated():
            owners = self._client.mget([lease_key(self._run, part) for part in range(num_parts)])
        return {part for part, owner in enumerate(owners) if owner is not None}

    def mark_exhausted(self, lease: Lease, *, extent: str) -> None:
        """All documents of the part within `extent` (Run.extent) are on the stream or dropped. FencedError if another
        collector has taken the part since."""
        keys = (fences_key(self._run), exhausted_key(self._run))
        with translated():
            done = self._client.eval(_MARK_EXHAUSTED, len(keys), *keys, lease.part, lease.epoch, extent)
        if done is None:
            reason = f"another collector has taken part {lease.part} since, or Redis has lost its data"
            raise FencedError(f"no end is marked: {reason}")

    def exhausted_parts(self, *, extent: str) -> set[int]:
        """Ends marked for another extent, such as fewer epochs, don't count."""
        with translated():
            found = self._client.hgetall(exhausted_key(self._run))
        return {int(part) for part, said in found.items() if said.decode() == extent}

    def source_exhausted(self, *, num_parts: int, extent: str) -> bool:
        return self.exhausted_parts(extent=extent) >= set(range(num_parts))
