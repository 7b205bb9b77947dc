"""Leases on parts of the source: takes free parts, renews them, and stops the work on a part whose lease was lost.

    every lease_s / 3:  renew all  ->  lost: cancel that part's work at once
                        acquire    ->  free (or freed by a dead collector): fence it (shared/records.py), start its work

A process that was frozen past its lease may learn of it by a refused write before its next renewal; then the work on
the part ends by itself. After an outage of Redis the first turn only renews, so that each collector can take up again
what it held. A part whose documents have ended stays leased until this process ends: nobody needs to look at it again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from services.collector.storage import Storage
from shared import metrics
from shared.errors import FencedError, StreamError
from shared.records import Lease

_log = logging.getLogger(__name__)
_RELEASE_TIMEOUT_S = 2.0


@dataclass
class _Held:
    """A part whose key in Redis is ours."""

    work: asyncio.Task[None]
    epoch: int | None = None
    """The fencing number; None until the part is fenced."""


class LeaseKeeper:
    """Runs `work(lease)` as a task for each part held by `owner`."""

    def __init__(
        self,
        storage: Storage,
        work: Callable[[Lease], Awaitable[None]],
        *,
        owner: str,
        lease_s: float,
        num_parts: int,
        max_parts: int,
    ) -> None:
        self._storage = storage
        self._work = work
        self._owner = owner
        self._lease_s = lease_s
        self._num_parts = num_parts
        self._max_parts = max_parts
        self._held: dict[int, _Held] = {}

    async def run(self) -> None:
        """Until cancelled, or until the work on a part fails. Gives its leases back in the end."""
        try:
            async with asyncio.TaskGroup() as group:
                reached = True
                while True:
                    try:
                        await self._renew(group)
                        if reached:
                            await self._acquire(group)
                        reached = True
                    except StreamError:  # logged by storage; nobody else reaches Redis to take our parts either
                        reached = False
                    await asyncio.sleep(self._lease_s / 3)
        finally:
            await self._release(list(self._held))

    async def _renew(self, group: asyncio.TaskGroup) -> None:
        epochs = {part: held.epoch for part, held in self._held.items()}
        renew = self._storage.coordination.renew_leases
        kept = await self._storage.leases(lambda: renew(epochs, self._owner, lease_s=self._lease_s))
        for part in epochs.keys() - kept:
            if held := self._held.pop(part, None):
                held.work.cancel()
                await asyncio.wait([held.work])
                group.create_task(self._note_loss(part, "its lease ended before it was renewed"))
        metrics.leased_parts.set(len(self._held))

    async def _acquire(self, group: asyncio.TaskGroup) -> None:
        free = [part for part in range(self._num_parts) if part not in self._held]
        room = self._max_parts - len(self._held)
        acquire = self._storage.coordination.acquire_leases
        for part in await self._storage.leases(lambda: acquire(free, self._owner, room=room, lease_s=self._lease_s)):
            _log.info("took part %d of %d", part, self._num_parts)
            self._held[part] = _Held(group.create_task(self._work_on(part), name=f"part-{part}"))
        metrics.leased_parts.set(len(self._held))

    async def _work_on(self, part: int) -> None:
        held = self._held[part]
        try:
            lease = await self._storage.take_part(part, self._owner)
            held.epoch = lease.epoch
            await self._work(lease)
        except FencedError as exc:
            if self._held.get(part) is held:  # else the renewal has noticed at the same time
                del self._held[part]
                await self._release([part])
                await self._note_loss(part, str(exc))

    async def _note_loss(self, part: int, why: str) -> None:
        message = f"part {part} is given up, its unfinished windows are another collector's: {why}"
        _log.warning(message)
        run = self._storage.run
        await self._storage.database(lambda: run.record_event("collector", "lease_lost", message, part=part))

    async def _release(self, parts: Sequence[int]) -> None:
        def release() -> None:
            for part in parts:
                self._storage.coordination.release_lease(part, self._owner)

        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await self._storage.leases(release)
        except (StreamError, TimeoutError):
            _log.warning("leases could not be given back; they end by themselves after %g s", self._lease_s)
