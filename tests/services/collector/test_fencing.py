"""A collector that was frozen past its lease changes nothing when it wakes. Real processes, SIGSTOP and SIGCONT."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from services.collector.storage import Storage
from services.collector.windows import PolicyTokenizer
from shared.database import CandidateRow, ChunkRow, CursorRow, EventRow, WindowRow, transaction
from shared.errors import FencedError
from shared.records import Lease, ScoredWindow
from shared.redis import lease_key, windows_key
from shared.settings import Settings
from shared.stream import StreamEntry
from tests.services.collector.processes import CollectorProcess, served, wait_for
from tests.services.collector.runs import Seen
from tests.services.collector.stub_services import StubServices
from tests.shared.scored import scored_window

MakeSettings = Callable[..., Settings]
JUDGE = "/v1/judgements"
NUM_DOCUMENTS = 8  # of make_settings


def left_behind(settings: Settings, seen: Seen) -> dict[str, Any]:
    """Everything that a collector may change: rows, stream, facts in Redis."""
    found: dict[str, Any] = {}
    with transaction(seen.run.database) as session:
        for table in (WindowRow, CursorRow, ChunkRow, CandidateRow):
            found[table.__tablename__] = session.execute(sa.select(*table.__table__.columns)).all()
    client = redis.Redis.from_url(settings.redis.url)
    found["stream"] = client.xrange(windows_key(settings.run.name))
    found["exhausted"] = seen.exhausted
    return found


def events(seen: Seen, kind: str) -> list[str]:
    with transaction(seen.run.database) as session:
        return list(session.scalars(sa.select(EventRow.message).where(EventRow.kind == kind)))


def train_some(seen: Seen) -> list[ScoredWindow]:
    """As a trainer would: three windows in a checkpoint, one dropped, the others left on the stream."""
    entries = [entry for entry in seen.stream.read(count=100, block_s=0.1) if isinstance(entry, StreamEntry)]
    finished, stale = entries[:3], entries[3]
    seen.ledger.mark_trained({entry.window.window_id: 1 for entry in finished})
    seen.ledger.drop(stale.window.key, reason="stale")
    seen.stream.acknowledge({entry.entry_id: entry.window.window_id for entry in [*finished, stale]})
    return [entry.window for entry in entries[4:]]


@contextmanager
def collector(settings: Settings, folder: Path) -> Iterator[CollectorProcess]:
    folder.mkdir()
    made = CollectorProcess(settings, folder)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(10)


@pytest.mark.parametrize("lease_s", [1.5, 600.0], ids=["renewal finds it", "a write finds it"])
def test_a_frozen_collector_changes_nothing_when_it_wakes(
    make_settings: MakeSettings, tmp_path: Path, lease_s: float
) -> None:
    """With the long lease nothing is renewed before the judge's answers come: every window is written and refused."""
    stub = StubServices(held={JUDGE})
    with served(stub.app) as url:
        settings = make_settings(url)
        patient = make_settings(url, collector={"lease_s": lease_s})
        seen, client = Seen(settings), redis.Redis.from_url(settings.redis.url)
        key = lease_key(settings.run.name, 0)
        with collector(patient, tmp_path / "first") as first:
            wait_for(lambda: bool(client.exists(key)))
            with collector(settings, tmp_path / "second") as second:
                wait_for(lambda: len(stub.bodies(JUDGE)) == NUM_DOCUMENTS)
                first.process.send_signal(signal.SIGSTOP)
                client.pexpire(key, 100)
                wait_for(lambda: len(stub.bodies(JUDGE)) == 2 * NUM_DOCUMENTS)
                stub.held.clear()
                wait_for(lambda: seen.balance.scored == NUM_DOCUMENTS and seen.exhausted)
                waiting = train_some(seen)
                before = left_behind(settings, seen)
                first.process.send_signal(signal.SIGCONT)
                wait_for(lambda: len(events(seen, "lease_lost")) == 1, timeout_s=30)
                assert left_behind(settings, seen) == before
                assert (first.process.poll(), second.process.poll()) == (None, None)
        assert first.log.read_text().count("is given up") == 1, first.log.read_text()
    balance = seen.balance
    assert (balance.read, balance.trained, balance.dropped, balance.scored) == (8, 3, {"stale": 1}, 4)
    assert seen.stream.window_ids() == {document.window_id for document in waiting}


def test_recorded_chunks_are_those_of_the_newest_lease(make_settings: MakeSettings, tokenizer: PolicyTokenizer) -> None:
    """The part may be taken between a window's row and its chunks."""
    seen = Seen(make_settings("http://127.0.0.1:1"))
    storage = Storage(seen.stream, seen.coordination, seen.run, tokenizer, record_share=1.0, max_backoff_s=0.01)
    first, second = (Lease(0, owner, seen.ledger.take_part(0, after=after)) for after, owner in enumerate("ab"))
    with pytest.raises(FencedError):
        storage.record(scored_window(0), first)
    storage.record(scored_window(0, text=" kept"), second)
    with pytest.raises(FencedError):
        storage.record(scored_window(0, text=" late"), first)
    with transaction(seen.run.database) as session:
        texts = session.scalars(sa.select(CandidateRow.text).order_by(CandidateRow.id)).all()
    assert texts == [" kept", " hill"]
