"""The run's small facts in a real Redis."""

import time

import pytest
import redis

from shared.coordination import AnnouncedWeights, Coordination, TrainerReport
from shared.errors import FencedError, SettingsError
from shared.records import Lease
from shared.redis import lease_key, require_url
from shared.settings import RedisSettings


@pytest.fixture
def coordination(client: redis.Redis, run: str) -> Coordination:
    return Coordination(client, run)


def acquire(coordination: Coordination, part: int, owner: str, *, lease_s: float = 30) -> bool:
    return bool(coordination.acquire_leases([part], owner, room=1, lease_s=lease_s))


def renew(coordination: Coordination, part: int, owner: str, *, epoch: int | None = None, lease_s: float = 30) -> bool:
    return coordination.renew_leases({part: epoch}, owner, lease_s=lease_s) == {part}


def end(coordination: Coordination, part: int, extent: str) -> None:
    """By a collector that holds the part."""
    lease = Lease(part, "holder", 1)
    acquire(coordination, part, lease.owner)
    assert coordination.raise_fence(lease)
    coordination.mark_exhausted(lease, extent=extent)


def test_nothing_is_known_at_first(coordination: Coordination) -> None:
    assert coordination.announced_version() is None
    assert coordination.trainer_report() is None
    assert not coordination.source_exhausted(num_parts=1, extent="all")


def test_announced_version_and_report_come_back(coordination: Coordination) -> None:
    coordination.announce_weights(0, epoch="e")
    assert coordination.announced_version() == 0
    assert coordination.announced_weights() == AnnouncedWeights(0, "e")
    for report in (TrainerReport(3, 2, "training"), TrainerReport(4, 4, "finished")):
        coordination.report_trainer(report)
        assert coordination.trainer_report() == report


def test_a_lease_has_one_holder(coordination: Coordination) -> None:
    assert acquire(coordination, 0, "a")
    assert not acquire(coordination, 0, "b")
    assert acquire(coordination, 1, "b")


def test_no_more_leases_are_taken_than_there_is_room(coordination: Coordination) -> None:
    acquire(coordination, 4, "another")
    assert coordination.acquire_leases([2, 4, 7, 9], "a", room=2, lease_s=30) == [2, 7]
    assert coordination.acquire_leases([9], "a", room=0, lease_s=30) == []
    assert coordination.acquire_leases([], "a", room=5, lease_s=30) == []


def test_a_silent_holder_loses_its_lease_and_cannot_renew_it(coordination: Coordination) -> None:
    acquire(coordination, 0, "a", lease_s=0.05)
    time.sleep(0.1)
    assert not renew(coordination, 0, "a")
    assert acquire(coordination, 0, "b")
    assert not renew(coordination, 0, "a")


def test_a_lease_that_ended_is_taken_up_again_while_its_number_stands(
    client: redis.Redis, run: str, coordination: Coordination
) -> None:
    acquire(coordination, 0, "a")
    assert coordination.raise_fence(Lease(0, "a", 1))
    client.delete(lease_key(run, 0))
    assert renew(coordination, 0, "a", epoch=1)
    client.delete(lease_key(run, 0))
    acquire(coordination, 0, "b")
    assert coordination.raise_fence(Lease(0, "b", 2))
    client.delete(lease_key(run, 0))
    assert not renew(coordination, 0, "a", epoch=1)
    client.flushall()
    assert not renew(coordination, 0, "b", epoch=2)


def test_many_leases_are_renewed_in_one_round_trip(client: redis.Redis, run: str, coordination: Coordination) -> None:
    coordination.acquire_leases(range(0, 90, 3), "a", room=4096, lease_s=1)
    client.config_resetstat()
    held = coordination.renew_leases(dict.fromkeys(range(100)), "a", lease_s=100)
    assert held == set(range(0, 90, 3))
    assert client.info("commandstats")["cmdstat_eval"]["calls"] == 1
    assert client.pttl(lease_key(run, 87)) > 90_000


def test_only_the_holder_raises_the_fence(coordination: Coordination) -> None:
    acquire(coordination, 0, "a")
    assert not coordination.raise_fence(Lease(0, "b", 9))
    end(coordination, 1, "all")
    assert coordination.raise_fence(Lease(0, "a", 3))
    for epoch in (2, 4):
        with pytest.raises(FencedError, match="another collector has taken part 0"):
            coordination.mark_exhausted(Lease(0, "a", epoch), extent="all")
    assert not coordination.source_exhausted(num_parts=2, extent="all")
    coordination.mark_exhausted(Lease(0, "a", 3), extent="all")
    coordination.mark_exhausted(Lease(0, "a", 3), extent="all")
    assert coordination.source_exhausted(num_parts=2, extent="all")


def test_only_the_holder_releases(coordination: Coordination) -> None:
    acquire(coordination, 0, "a")
    coordination.release_lease(0, "b")
    assert not acquire(coordination, 0, "b")
    coordination.release_lease(0, "a")
    assert acquire(coordination, 0, "b")


def test_the_source_is_exhausted_when_every_part_is_for_what_was_to_be_read(coordination: Coordination) -> None:
    end(coordination, 1, "one epoch")
    end(coordination, 1, "one epoch")
    assert not coordination.source_exhausted(num_parts=2, extent="one epoch")
    end(coordination, 0, "one epoch")
    assert coordination.source_exhausted(num_parts=2, extent="one epoch")
    end(coordination, 1, "two epochs")
    assert coordination.exhausted_parts(extent="two epochs") == {1}
    assert not coordination.source_exhausted(num_parts=2, extent="one epoch")
    assert not coordination.source_exhausted(num_parts=2, extent="two epochs")


def test_runs_do_not_see_each_other(client: redis.Redis, run: str) -> None:
    Coordination(client, run).announce_weights(5)
    assert Coordination(client, f"{run}-other").announced_version() is None


def test_an_empty_redis_url_says_how_to_give_one() -> None:
    """The example must survive the removal of secrets from error texts."""
    with pytest.raises(SettingsError, match=r"--redis\.url redis://127\.0\.0\.1:6379$"):
        require_url(RedisSettings())
