"""Leases on parts of the source: takes free parts, renews them, and stops the work on a part whose lease was lost.

    every lease_s / 3:  renew all  ->  lost: cancel that part's work at once
                        acquire    ->  free (or freed by a dead collector): start its work

A part whose documents have ended stays leased until this process ends: nobody needs to look at it again.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from services.collector.storage import Storage
from shared import metrics
from shared.errors import StreamError

_log = logging.getLogger(__name__)
_RELEASE_TIMEOUT_S = 2.0


class LeaseKeeper:
    """Runs `work(part)` as a task for each part held by `owner`."""

    def __init__(
        self,
        storage: Storage,
        work: Callable[[int], Awaitable[None]],
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
        self._held: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled, or until the work on a part fails. Gives its leases back in the end."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    try:
                        await self._renew()
                        await self._acquire(group)
                    except StreamError:  # logged by storage; nobody else reaches Redis to take our parts either
                        pass
                    await asyncio.sleep(self._lease_s / 3)
        finally:
            await self._release()

    async def _renew(self) -> None:
        held = sorted(self._held)
        kept = await self._storage.redis_once(lambda: self._renew_all(held))
        for part in set(held) - kept:
            _log.warning("the lease on part %d was lost; its unfinished windows are given up", part)
            task = self._held.pop(part)
            task.cancel()
            await asyncio.wait([task])
        metrics.leased_parts.set(len(self._held))

    async def _acquire(self, group: asyncio.TaskGroup) -> None:
        room = self._max_parts - len(self._held)
        free = [part for part in range(self._num_parts) if part not in self._held]
        for part in await self._storage.redis_once(lambda: self._acquire_some(free, room)):
            _log.info("took part %d of %d", part, self._num_parts)
            self._held[part] = group.create_task(self._work_on(part), name=f"part-{part}")
        metrics.leased_parts.set(len(self._held))

    async def _work_on(self, part: int) -> None:
        await self._work(part)

    def _renew_all(self, parts: Sequence[int]) -> set[int]:
        renew = self._storage.coordination.renew_lease
        return {part for part in parts if renew(part, self._owner, lease_s=self._lease_s)}

    def _acquire_some(self, parts: Sequence[int], room: int) -> list[int]:
        taken: list[int] = []
        for part in parts:
            if len(taken) >= room:
                break
            if self._storage.coordination.acquire_lease(part, self._owner, lease_s=self._lease_s):
                taken.append(part)
        return taken

    async def _release(self) -> None:
        def release() -> None:
            for part in self._held:
                self._storage.coordination.release_lease(part, self._owner)

        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                await self._storage.redis_once(release)
        except (StreamError, TimeoutError):
            _log.warning("leases could not be given back; they end by themselves after %g s", self._lease_s)
