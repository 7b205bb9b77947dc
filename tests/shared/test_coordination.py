"""The run's small facts in a real Redis."""

import time

import redis

from shared.coordination import AnnouncedWeights, Coordination, TrainerReport
from shared.stream import lease_key


def test_nothing_is_known_at_first(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    assert coordination.announced_version() is None
    assert coordination.trainer_report() is None
    assert not coordination.source_exhausted(num_parts=1)


def test_announced_version_and_report_come_back(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    coordination.announce_weights(0, epoch="e")
    assert coordination.announced_version() == 0
    assert coordination.announced_weights() == AnnouncedWeights(0, "e")
    for report in (TrainerReport(3, 2, "training"), TrainerReport(4, 4, "finished")):
        coordination.report_trainer(report)
        assert coordination.trainer_report() == report


def test_a_lease_has_one_holder(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    assert coordination.acquire_lease(0, "a", lease_s=30)
    assert coordination.acquire_lease(0, "a", lease_s=30)
    assert not coordination.acquire_lease(0, "b", lease_s=30)
    assert coordination.acquire_lease(1, "b", lease_s=30)


def test_a_silent_holder_loses_its_lease_and_cannot_renew_it(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    coordination.acquire_lease(0, "a", lease_s=0.05)
    time.sleep(0.1)
    assert not coordination.renew_lease(0, "a", lease_s=30)
    assert coordination.acquire_lease(0, "b", lease_s=30)
    assert not coordination.renew_lease(0, "a", lease_s=30)


def test_renewing_extends_the_lease(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    coordination.acquire_lease(0, "a", lease_s=1)
    assert coordination.renew_lease(0, "a", lease_s=100)
    assert client.pttl(lease_key(run, 0)) > 90_000


def test_only_the_holder_releases(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    coordination.acquire_lease(0, "a", lease_s=30)
    coordination.release_lease(0, "b")
    assert not coordination.acquire_lease(0, "b", lease_s=30)
    coordination.release_lease(0, "a")
    assert coordination.acquire_lease(0, "b", lease_s=30)


def test_the_source_is_exhausted_when_every_part_is(client: redis.Redis, run: str) -> None:
    coordination = Coordination(client, run)
    coordination.mark_exhausted(1)
    coordination.mark_exhausted(1)
    assert not coordination.source_exhausted(num_parts=2)
    coordination.mark_exhausted(0)
    assert coordination.source_exhausted(num_parts=2)


def test_runs_do_not_see_each_other(client: redis.Redis, run: str) -> None:
    Coordination(client, run).announce_weights(5)
    assert Coordination(client, f"{run}-other").announced_version() is None
