"""Leases on parts of the source: acquire free parts, renew them, stop work on a part whose lease is lost.

    every lease_s / 3:  renew all  ->  lost: cancel the work on that part at once
                        acquire    ->  free: fence it off (see `Lease` in shared/records.py) and start working on it

A process that was frozen past its lease may learn of the loss from a refused write before its next renewal; then the
work on the part ends there. After a Redis outage the first turn only renews, so each collector keeps what it held. A
part whose documents have ended stays leased until the process ends.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from services.collector.storage import Storage
from shared import metrics
from shared.errors import FencedError, StreamError
from shared.records import Lease

_log = logging.getLogger(__name__)
_RELEASE_TIMEOUT_S = 2.0


@dataclass
class _Held:
    work: asyncio.Task[None]
    epoch: int | None = None  # the fencing number; None until the part is fenced


@dataclass
class LeaseKeeper:
    """Runs `work(lease)` as a task for each part held by `owner`."""

    storage: Storage
    work: Callable[[Lease], Awaitable[None]]
    owner: str
    lease_s: float
    num_parts: int
    max_parts: int
    _held: dict[int, _Held] = field(default_factory=dict)

    async def run(self) -> None:
        """Until cancelled, or until the work on a part fails. Then releases the leases."""
        try:
            async with asyncio.TaskGroup() as group:
                reached = True
                while True:
                    try:
                        await self._renew(group)
                        if reached:
                            await self._acquire(group)
                        reached = True
                    except StreamError:  # logged by storage; no other collector reaches Redis to take our parts either
                        reached = False
                    await asyncio.sleep(self.lease_s / 3)
        finally:
            await self._release(list(self._held))

    async def _renew(self, group: asyncio.TaskGroup) -> None:
        epochs = {part: held.epoch for part, held in self._held.items()}
        renew = self.storage.coordination.renew_leases
        kept = await self.storage.once_for_leases(renew, epochs, self.owner, lease_s=self.lease_s)
        for part in epochs.keys() - kept:
            if held := self._held.pop(part, None):
                held.work.cancel()
                await asyncio.wait([held.work])
                group.create_task(self._note_loss(part, "its lease ended before it was renewed"))
        metrics.leased_parts.set(len(self._held))

    async def _acquire(self, group: asyncio.TaskGroup) -> None:
        free = [part for part in range(self.num_parts) if part not in self._held]
        acquire, room = self.storage.coordination.acquire_leases, self.max_parts - len(self._held)
        for part in await self.storage.once_for_leases(acquire, free, self.owner, room=room, lease_s=self.lease_s):
            _log.info("took part %d of %d", part, self.num_parts)
            self._held[part] = _Held(group.create_task(self._work_on(part), name=f"part-{part}"))
        metrics.leased_parts.set(len(self._held))

    async def _work_on(self, part: int) -> None:
        held = self._held[part]
        try:
            lease = await self.storage.take_part(part, self.owner)
            held.epoch = lease.epoch
            await self.work(lease)
        except FencedError as exc:
            if self._held.get(part) is held:  # else the renewal has noticed at the same time
                del self._held[part]
                await self._release([part])
                await self._note_loss(part, str(exc))

    async def _note_loss(self, part: int, why: str) -> None:
        message = f"part {part} is given up, another collector finishes its windows: {why}"
        _log.warning(message)
        await self.storage.in_database(self.storage.run.record_event, "collector", "lease_lost", message, part=part)

    async def _release(self, parts: Sequence[int]) -> None:
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                for part in parts:
                    await self.storage.once_for_leases(self.storage.coordination.release_lease, part, self.owner)
        except (StreamError, TimeoutError):
            _log.warning("leases could not be released; they expire after %g s", self.lease_s)
