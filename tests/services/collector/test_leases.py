"""Leases under load and after outages, with a real Redis."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import pytest

from services.collector.leases import LeaseKeeper
from services.collector.storage import Storage
from services.collector.windows import PolicyTokenizer
from shared.coordination import Coordination
from shared.errors import FencedError, StreamError
from shared.records import Lease
from shared.redis import connect
from shared.settings import Settings
from tests.services.collector.runs import Seen, until
from tests.shared.scored import scored_window

MakeSettings = Callable[..., Settings]
MakeStorage = Callable[..., Storage]
URL = "http://127.0.0.1:1"


@pytest.fixture
def seen(make_settings: MakeSettings) -> Seen:
    return Seen(make_settings(URL))


@pytest.fixture
def make_storage(make_settings: MakeSettings, seen: Seen, tokenizer: PolicyTokenizer) -> MakeStorage:
    settings = make_settings(URL)

    def make(coordination: type[Coordination] = Coordination) -> Storage:
        own = coordination(connect(settings.redis.url, timeout_s=2), settings.run.name)
        return Storage(seen.stream, own, seen.run, tokenizer, record_share=0.0, max_backoff_s=0.01)

    return make


async def work_for_ever(lease: Lease) -> None:
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def keeping(
    storage: Storage, work: Callable[[Lease], Awaitable[None]] = work_for_ever, *, lease_s: float
) -> AsyncIterator[asyncio.Task[None]]:
    keeper = LeaseKeeper(storage, work, owner="me", lease_s=lease_s, num_parts=1, max_parts=1)
    task = asyncio.create_task(keeper.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_calls_that_hang_delay_no_renewal(
    seen: Seen, make_storage: MakeStorage, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    class Hanging(Coordination):
        def exhausted_parts(self, *, extent: str) -> set[int]:
            released.wait()
            return set()

    async def run() -> None:
        storage = make_storage(Hanging)
        async with keeping(storage, lease_s=0.6) as task:
            await until(lambda: seen.coordination.lease_owner(0) is not None, task=task)
            hanging = [
                asyncio.create_task(storage.in_redis(storage.coordination.exhausted_parts, extent=""))
                for _ in range(40)
            ]
            await asyncio.sleep(1.2)
            owner = seen.coordination.lease_owner(0)
            released.set()
            await asyncio.gather(*hanging)
            assert owner == "me"

    caplog.set_level(logging.WARNING)
    asyncio.run(run())
    assert caplog.messages == []


def test_after_an_outage_what_was_held_is_renewed_before_anything_is_taken(make_storage: MakeStorage) -> None:
    calls: list[str] = []

    class Interrupted(Coordination):
        def renew_leases(self, epochs: Mapping[int, int | None], owner: str, *, lease_s: float) -> set[int]:
            calls.append("renew")
            if calls.count("renew") == 2:
                raise StreamError("away")
            return super().renew_leases(epochs, owner, lease_s=lease_s)

        def acquire_leases(self, parts: Sequence[int], owner: str, *, room: int, lease_s: float) -> list[int]:
            calls.append("acquire")
            return super().acquire_leases(parts, owner, room=room, lease_s=lease_s)

    async def run() -> None:
        async with keeping(make_storage(Interrupted), lease_s=0.15) as task:
            await until(lambda: len(calls) >= 6, task=task)

    asyncio.run(run())
    assert calls[:6] == ["renew", "acquire", "renew", "renew", "renew", "acquire"]


def test_a_part_that_another_fenced_is_given_up_and_taken_again(seen: Seen, make_storage: MakeStorage) -> None:
    """A process that no longer holds the part raised its number: ours notices and starts over."""
    storage = make_storage()
    leases: list[Lease] = []

    async def work(lease: Lease) -> None:
        leases.append(lease)
        if lease.epoch == 1:
            seen.ledger.take_part(0, after=1)
            await storage.left_over(lease)
        await asyncio.Event().wait()

    async def run() -> None:
        async with keeping(storage, work, lease_s=0.3) as task:
            await until(lambda: len(leases) >= 2, task=task)

    asyncio.run(run())
    assert leases == [Lease(0, "me", 1), Lease(0, "me", 3)]


def test_a_collector_that_is_frozen_while_it_takes_a_part_does_not_fence_off_the_next(
    seen: Seen, make_storage: MakeStorage
) -> None:
    coordination = seen.coordination

    def another_takes() -> None:
        coordination.release_lease(0, "me")
        assert coordination.acquire_leases([0], "another", room=1, lease_s=30)
        assert coordination.raise_fence(Lease(0, "another", seen.ledger.take_part(0, after=0)))

    class FrozenBeforeItRaises(Coordination):
        def lease_owner(self, part: int) -> str | None:
            owner = super().lease_owner(part)
            another_takes()
            return owner

    assert coordination.acquire_leases([0], "me", room=1, lease_s=30)
    with pytest.raises(FencedError, match="part 0 was taken by another collector after lease number 0"):
        asyncio.run(make_storage(FrozenBeforeItRaises).take_part(0, "me"))
    with pytest.raises(FencedError, match="ended before the work on it began"):
        asyncio.run(make_storage().take_part(0, "me"))
    assert seen.ledger.lease_epoch(0) == 1
    seen.stream.write(scored_window(0), Lease(0, "another", 1))
