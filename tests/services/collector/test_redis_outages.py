"""What an outage of Redis costs: counted in commands and bytes, since seconds depend on the machine."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa

from shared.database import PartRow, transaction
from shared.ledger import WindowStart
from shared.settings import Settings
from tests.services.collector.processes import RedisProcess, served
from tests.services.collector.runs import Seen, collecting, until, write_documents
from tests.services.collector.stub_services import StubServices
from tests.shared.scored import scored_document

MakeSettings = Callable[..., Settings]
JUDGE = "/v1/judgements"
NUM_IN_FLIGHT, NUM_ON_STREAM, BODY_BYTES = 40, 200, 50_000


def lie_on_stream(seen: Seen) -> None:
    """Many large entries of part 1, which nobody reads here."""
    for position in range(NUM_ON_STREAM):
        document = scored_document(position, part=1, text=os.urandom(BODY_BYTES // 2).hex())
        seen.ledger.begin([WindowStart(document.key, "d", 32)])
        seen.stream.write(document)
        seen.ledger.mark_scored(document.key, num_chunks=1, num_dropped_chunks=0, policy_version=2)


@pytest.mark.parametrize("lease_s", [30.0, 1.5], ids=["lease outlives it", "lease ends in it"])
def test_a_redis_restart_under_load_throws_away_no_window_and_no_lease(
    make_settings: MakeSettings, tmp_path: Path, lease_s: float
) -> None:
    (tmp_path / "redis").mkdir()
    server = RedisProcess(tmp_path / "redis")
    server.start()
    stub = StubServices(held={JUDGE})
    documents = {"path": str(write_documents(tmp_path / "documents.jsonl", NUM_IN_FLIGHT)), "num_parts": 2}
    limits = {"max_documents_in_flight": NUM_IN_FLIGHT, "lease_s": lease_s, "max_parts": 1, "record_share": 0.0}
    with served(stub.app) as url:
        settings = make_settings(url, documents=documents, redis={"url": server.url, "timeout_s": 1}, collector=limits)
        seen = Seen(settings)
        lie_on_stream(seen)

        async def run() -> None:
            async with collecting(settings) as task:
                await until(lambda: len(stub.bodies(JUDGE)) == NUM_IN_FLIGHT // 2, task=task)
                server.stop()
                stub.held.clear()
                await asyncio.sleep(2)
                server.start()
                await until(lambda: seen.balance.scored == NUM_ON_STREAM + NUM_IN_FLIGHT // 2, task=task)

        asyncio.run(run())
    assert len(stub.bodies(JUDGE)) == NUM_IN_FLIGHT // 2, "what was judged is not judged again"
    with transaction(seen.ledger.engine) as session:
        assert session.scalars(sa.select(PartRow.lease_epoch)).all() == [1], "no part was taken twice"
    client = redis.Redis.from_url(server.url)
    calls = {name: stats["calls"] for name, stats in client.info("commandstats").items()}
    assert "cmdstat_xrange" not in calls, calls
    assert client.info("stats")["total_net_output_bytes"] < 20 * BODY_BYTES
    server.stop()
