"""Kills, outages and restarts: nothing lost, nothing twice."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.responses import Response

from services.collector.storage import Storage
from services.collector.windows import PolicyTokenizer
from shared.coordination import TrainerReport
from shared.errors import DatabaseRefusalError, StreamError
from shared.ledger import WindowStart
from shared.records import Lease, ScoredWindow, WindowKey
from shared.redis import connect
from shared.settings import Settings
from shared.stream import WindowStream
from tests.services.collector.processes import CollectorProcess, free_port, served, wait_for
from tests.services.collector.runs import Seen, beside, collect_all, until
from tests.services.collector.stub_services import StubServices
from tests.shared.scored import scored_window

MakeSettings = Callable[..., Settings]


def names(found: list[ScoredWindow]) -> list[str]:
    return sorted(document.source_id for document in found)


ALL_EIGHT = [f"d{index}" for index in range(8)]


def test_a_judge_that_is_away_is_waited_for_and_nothing_is_lost(make_settings: MakeSettings) -> None:
    def away(path: str, body: Any) -> Response | None:
        return Response(status_code=503) if path == "/v1/judgements" and time.monotonic() < back else None

    back = time.monotonic() + 1
    with served(StubServices(away).app) as url:
        seen = collect_all(make_settings(url))
    found = seen.take_all()
    assert names(found) == ALL_EIGHT
    assert seen.balance.dropped == {}
    assert all(chunk.judgement for document in found for chunk in document.chunks)


def test_no_more_windows_start_than_backlog_and_flight_allow(make_settings: MakeSettings) -> None:
    stub = StubServices(seconds=0.05)
    with served(stub.app) as url:
        limits = {"max_windows_in_flight": 2, "max_backlog": 5}
        settings = make_settings(url, collector=limits)
        seen = Seen(settings)

        async def story(task: asyncio.Task[None]) -> list[ScoredWindow]:
            await until(lambda: seen.stream.backlog().unread == 5, task=task)
            await asyncio.sleep(0.4)
            assert seen.stream.backlog().unread == 5
            assert len(stub.bodies("/v1/rollouts")) == 5
            found = seen.take_all()
            await until(lambda: seen.exhausted, task=task)
            return found + seen.take_all()

        assert names(beside(settings, story)) == ALL_EIGHT
    assert stub.max_at_once <= 2 * 2, "two windows, each asking rollout and rewriter at the same time"


@pytest.mark.parametrize("stays", [False, True])
def test_when_the_trainer_has_finished_the_collector_ends_or_stays_idle(
    make_settings: MakeSettings, stays: bool
) -> None:
    with served(StubServices(seconds=60).app) as url:
        collector = {"stay_when_finished": stays, "port": free_port()}
        settings = make_settings(url, trainer={"steps": 5}, collector=collector)
        seen = Seen(settings)

        def is_free() -> bool:
            return bool(seen.coordination.acquire_leases([0], "another", room=1, lease_s=1))

        async def story(task: asyncio.Task[None]) -> None:
            await until(lambda: seen.balance.reading > 0, task=task)
            seen.coordination.report_trainer(TrainerReport(5, 5, "finished"))
            if not stays:
                await asyncio.wait_for(task, 10)
                assert is_free()
                return
            await until(is_free, task=task)
            await asyncio.sleep(0.5)
            assert not task.done()
            ready = f"http://127.0.0.1:{settings.collector.port}/readyz"
            assert (await asyncio.to_thread(httpx.get, ready)).is_success

        beside(settings, story)
    assert seen.balance.reading == seen.balance.read > 0


def test_the_report_of_an_earlier_end_does_not_stop_a_longer_run(make_settings: MakeSettings) -> None:
    with served(StubServices().app) as url:
        settings = make_settings(url, trainer={"steps": 50})
        Seen(settings).coordination.report_trainer(TrainerReport(5, 5, "finished"))
        assert names(collect_all(settings).take_all()) == ALL_EIGHT


def test_a_stopped_collector_gives_its_leases_back_and_the_next_redoes_its_windows(make_settings: MakeSettings) -> None:
    slow = StubServices(seconds=60)
    with served(slow.app) as url:
        settings = make_settings(url)
        seen = Seen(settings)

        async def story(task: asyncio.Task[None]) -> None:
            await until(lambda: len(slow.requests) >= 6, task=task)

        beside(settings, story)
    assert seen.coordination.acquire_leases([0], "another", room=1, lease_s=0.001)
    assert seen.balance.reading >= 3
    with served(StubServices().app) as url:
        found = collect_all(make_settings(url)).take_all()
    assert names(found) == ALL_EIGHT
    assert seen.balance.read == seen.balance.scored == 8


def test_a_crash_between_write_and_mark_scored_gives_no_duplicate(make_settings: MakeSettings) -> None:
    stub = StubServices()
    with served(stub.app) as url:
        settings = make_settings(url)
        seen = Seen(settings)
        seen.ledger.begin([WindowStart(WindowKey(part=0, epoch=0, position=0, window=0), "d", 32)])
        seen.stream.write(scored_window(0))
        collect_all(settings)
    found = seen.take_all()
    assert Counter(document.window_id for document in found) == {f"0.0.{index}.0": 1 for index in range(8)}
    assert len(stub.bodies("/v1/rollouts")) == 7
    assert seen.balance.scored == 8


def test_documents_of_a_redis_that_lost_its_memory_are_done_again(make_settings: MakeSettings) -> None:
    with served(StubServices().app) as url:
        settings = make_settings(url)
        seen = collect_all(settings)
        taken = seen.take_all()
        seen.ledger.mark_trained({taken[0].window_id: 1})
        connect(settings.redis.url, timeout_s=2).flushall()
        again = collect_all(settings).take_all()
    assert names(again) == sorted(document.source_id for document in taken[1:])


def test_windows_whose_source_is_gone_are_dropped_not_kept_forever(make_settings: MakeSettings) -> None:
    with served(StubServices().app) as url:
        settings = make_settings(url, documents={"shuffle_buffer": 1})
        seen = Seen(settings)
        keys = [
            WindowKey(part=0, epoch=0, position=place, window=window) for place, window in ((2, 0), (2, 9), (77, 0))
        ]
        seen.ledger.begin([WindowStart(key, f"d{key.position}", 32) for key in keys])
        collect_all(settings)
    assert seen.balance.dropped == {"source_changed": 2}
    assert seen.balance.reading == 0


def test_a_write_whose_answer_was_lost_is_repeated_and_there_once(
    make_settings: MakeSettings, tokenizer: PolicyTokenizer
) -> None:
    class AnswerLost(WindowStream):
        num_writes = 0

        def append(self, window_id: str, body: bytes, *, lease: Lease | None) -> str:
            entry = super().append(window_id, body, lease=lease)
            self.num_writes += 1
            if self.num_writes == 1:
                raise StreamError("the answer was lost")
            return entry

    seen = Seen(settings := make_settings("http://127.0.0.1:1"))
    stream = AnswerLost(connect(settings.redis.url, timeout_s=2), settings.run.name)
    storage = Storage(stream, seen.coordination, seen.run, tokenizer, record_share=0.0, max_backoff_s=0.01)
    assert seen.coordination.acquire_leases([0], "me", room=1, lease_s=30)

    async def write() -> None:
        await storage.write(scored_window(0), await storage.take_part(0, "me"))

    asyncio.run(write())
    assert stream.num_writes == 2
    assert [document.window_id for document in seen.take_all()] == ["0.0.0.0"]


def test_a_locked_database_is_waited_for(make_settings: MakeSettings) -> None:
    with served(StubServices(seconds=0.1).app) as url:
        settings = make_settings(url)
        seen = Seen(settings)

        async def story(task: asyncio.Task[None]) -> None:
            await until(lambda: seen.balance.scored >= 1, task=task)
            with seen.run.database.connect() as other:
                other.exec_driver_sql("BEGIN EXCLUSIVE")
                await asyncio.sleep(1)
                other.rollback()
            await until(lambda: seen.exhausted, task=task)

        beside(settings, story)
    assert names(seen.take_all()) == ALL_EIGHT


def test_a_killed_collector_is_followed_by_another_that_takes_its_part(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    def slow_at_first(path: str, body: Any) -> Response | None:
        return Response(status_code=503) if killed is None and len(stub.bodies("/v1/judgements")) > 3 else None

    killed: float | None = None
    stub = StubServices(slow_at_first)
    with served(stub.app) as url:
        settings = make_settings(url)
        seen = Seen(settings)
        first = CollectorProcess(settings, tmp_path)
        wait_for(lambda: seen.balance.reading >= 2 and len(stub.bodies("/v1/judgements")) > 6)

        async def story(task: asyncio.Task[None]) -> None:
            nonlocal killed
            await asyncio.sleep(0.5)
            assert not seen.coordination.acquire_leases([0], "third", room=1, lease_s=1), "the first still holds it"
            first.end(signal.SIGKILL)
            killed = time.monotonic()
            await until(lambda: seen.exhausted, task=task)

        beside(settings, story)
    found = seen.take_all()
    assert names(found) == ALL_EIGHT
    assert seen.balance.read == seen.balance.scored == 8


def test_sigterm_ends_the_process_calmly_with_status_0(make_settings: MakeSettings, tmp_path: Path) -> None:
    with served(StubServices(seconds=60).app) as url:
        settings = make_settings(url)
        seen = Seen(settings)
        process = CollectorProcess(settings, tmp_path)
        wait_for(lambda: seen.balance.reading >= 2)
        assert process.end(signal.SIGTERM) == 0
    assert "Traceback" not in process.log.read_text()
    assert seen.coordination.acquire_leases([0], "another", room=1, lease_s=1)


def test_a_wrong_setting_ends_the_process_with_one_line(make_settings: MakeSettings, tmp_path: Path) -> None:
    settings = make_settings("http://127.0.0.1:1", documents={"path": str(tmp_path / "none.jsonl")})
    process = CollectorProcess(settings, tmp_path)
    assert process.process.wait(90) == 1
    errors = [line for line in process.log.read_text().splitlines() if '"level": "error"' in line]
    assert len(errors) == 1
    assert "matches no file" in errors[0]
    assert "Traceback" not in process.log.read_text()


def test_what_the_database_refuses_ends_the_collector_at_once(make_settings: MakeSettings) -> None:
    """An outage is waited out; a refusal stays one however often it is asked."""
    with served(StubServices().app) as url:
        settings = make_settings(url)
        refusal = "BEGIN SELECT RAISE(ABORT, 'no such windows here'); END"
        with Seen(settings).run.database.begin() as connection:
            connection.exec_driver_sql(f"CREATE TRIGGER refuse BEFORE INSERT ON windows {refusal}")

        async def story(task: asyncio.Task[None]) -> None:
            await asyncio.wait_for(task, 20)

        with pytest.raises(DatabaseRefusalError, match="no such windows here"):
            beside(settings, story)
