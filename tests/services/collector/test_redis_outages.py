"""What an outage of Redis costs, in commands and bytes (seconds depend on the machine), and one that lost its data."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from services.collector.service import run_collector
from shared.checkpoint_state import StepFigures
from shared.coordination import TrainerReport
from shared.database import PartRow, transaction
from shared.errors import StreamSchemaError
from shared.ledger import WindowStart
from shared.redis import windows_key
from shared.settings import Secrets, Settings
from shared.stream import encode
from tests.services.collector.processes import RedisProcess, served
from tests.services.collector.runs import Seen, beside, collect_all, until, write_documents
from tests.services.collector.stub_services import StubServices
from tests.shared.scored import scored_window

MakeSettings = Callable[..., Settings]
JUDGE = "/v1/judgements"
NUM_IN_FLIGHT, NUM_ON_STREAM, BODY_BYTES = 40, 50, 50_000


def lie_on_stream(seen: Seen) -> None:
    """Many large entries of part 1, which nobody reads here."""
    text = os.urandom(BODY_BYTES).hex()
    documents = [scored_window(position, part=1, text=text) for position in range(NUM_ON_STREAM)]
    seen.ledger.begin([WindowStart(document.key, "d", 32) for document in documents])
    for document in documents:
        seen.stream.write(document)


@pytest.mark.parametrize("lease_s", [30.0, 1.2], ids=["lease outlives it", "lease ends in it"])
def test_a_redis_restart_under_load_throws_away_no_window_and_no_lease(
    make_settings: MakeSettings, tmp_path: Path, lease_s: float
) -> None:
    (tmp_path / "redis").mkdir()
    server = RedisProcess(tmp_path / "redis")
    server.start()
    stub = StubServices(held={JUDGE})
    documents = {"path": str(write_documents(tmp_path / "documents.jsonl", NUM_IN_FLIGHT)), "num_parts": 2}
    limits = {"max_windows_in_flight": NUM_IN_FLIGHT, "lease_s": lease_s, "max_parts": 1, "record_share": 0.0}
    with served(stub.app) as url:
        settings = make_settings(url, documents=documents, redis={"url": server.url, "timeout_s": 1}, collector=limits)
        seen = Seen(settings)
        lie_on_stream(seen)

        async def story(task: asyncio.Task[None]) -> None:
            await until(lambda: len(stub.bodies(JUDGE)) == NUM_IN_FLIGHT // 2, task=task)
            server.stop()
            stub.held.clear()
            await asyncio.sleep(1.5)
            server.start()
            await until(lambda: seen.balance.scored == NUM_IN_FLIGHT // 2, task=task)

        beside(settings, story)
    assert len(stub.bodies(JUDGE)) == NUM_IN_FLIGHT // 2, "what was judged is not judged again"
    with transaction(seen.run.database) as session:
        assert session.scalars(sa.select(PartRow.lease_epoch)).all() == [1], "no part was taken twice"
    client = redis.Redis.from_url(server.url)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert "cmdstat_xrange" not in calls, calls
    assert client.info("stats")["total_net_output_bytes"] < BODY_BYTES
    assert len(seen.stream.window_ids()) == NUM_ON_STREAM + NUM_IN_FLIGHT // 2, "nothing is lost, nothing twice"
    server.stop()


SCHEDULE = [{"kinds": ["original", "rewrite"], "num_rollouts": 0}, {"from_step": 3, "num_rollouts": 5}]


def test_the_schedules_stage_follows_the_trainer_and_never_falls_back(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    documents = {"path": str(write_documents(tmp_path / "documents.jsonl", 20))}
    with served(StubServices().app) as url:
        limits = {"schedule": SCHEDULE, "max_backlog": 2}
        settings = make_settings(url, documents=documents, collector=limits)
        seen = Seen(settings)

        async def story(task: asyncio.Task[None]) -> list[set[int]]:
            async def num_candidates_of_next() -> set[int]:
                await until(lambda: seen.stream.backlog().unread == 2, task=task)
                return {len(chunk.candidates) for window in seen.take_all() for chunk in window.chunks}

            found = [await num_candidates_of_next()]
            seen.coordination.announce_weights(9)  # versions jump when a trainer resumes: they don't count
            seen.take_all()
            found.append(await num_candidates_of_next())
            seen.coordination.report_trainer(TrainerReport(3, 9, "training"))
            await asyncio.sleep(0.5)
            seen.take_all()
            found.append(await num_candidates_of_next())
            redis.Redis.from_url(settings.redis.url).flushall()
            seen.stream.create()
            return [*found, await num_candidates_of_next(), await num_candidates_of_next()]

        assert beside(settings, story) == [{2}, {2}, {7}, {7}, {7}]


def test_a_collector_that_starts_on_an_empty_redis_takes_the_stage_of_the_newest_step(
    make_settings: MakeSettings,
) -> None:
    stub = StubServices()
    with served(stub.app) as url:
        settings = make_settings(url, collector={"schedule": SCHEDULE})
        seen = Seen(settings)
        seen.run.record_step(3, StepFigures(at=1.0, weight_version=1, figures={}))
        collect_all(settings)
    assert [body["num_rollouts"] for body in stub.bodies("/v1/rollouts")] == [5] * 8


def test_a_stream_of_an_older_version_stops_the_collector_and_stays(make_settings: MakeSettings) -> None:
    settings = make_settings("http://127.0.0.1:1")
    client, key = redis.Redis.from_url(settings.redis.url), windows_key(settings.run.name)
    client.xadd(key, {"id": "0.0.0.0", "body": encode(scored_window(0))})
    with pytest.raises(StreamSchemaError, match="older version"):
        asyncio.run(run_collector(settings, Secrets()))
    assert client.xlen(key) == 1
