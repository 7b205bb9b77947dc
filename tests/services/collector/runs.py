"""Runs a collector in the test's own event loop, and looks at what it leaves on the stream and in the ledger."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from cli import audit_checks
from cli.audit_sources import read_account
from services.collector.service import run_collector
from shared.coordination import Coordination
from shared.database import migrate
from shared.ledger import Balance
from shared.records import ScoredWindow
from shared.redis import connect
from shared.runs import Run
from shared.settings import Secrets, Settings
from shared.stream import BrokenEntry, WindowStream

T = TypeVar("T")
SENTENCE = "The moon moves around the earth in about twenty-seven days. "


def write_documents(path: Path, num_documents: int) -> Path:
    """JSONL of documents `d0`, `d1`, ...: each one window of 32 tokens or a little less."""
    lines = [json.dumps({"id": f"d{index}", "text": f"{index}: {SENTENCE[:40]}"}) for index in range(num_documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Seen:
    """The trainer's view of a run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        client = connect(settings.redis.url, timeout_s=2)
        self.stream = WindowStream(client, settings.run.name)
        self.stream.create()
        self.coordination = Coordination(client, settings.run.name)
        self.run = Run.of(settings)
        migrate(self.run.database)
        self.ledger = self.run.ledger

    @property
    def exhausted(self) -> bool:
        documents = self._settings.documents
        extent = self.run.extent(max_epochs=documents.max_epochs)
        return self.coordination.source_exhausted(num_parts=documents.num_parts, extent=extent)

    @property
    def balance(self) -> Balance:
        return self.ledger.balance()

    @property
    def contradictions(self) -> list[str]:
        """Windows that cursors and numbers of windows tell of and that have no row, or the other way round."""
        account = read_account(self.run.database, self.run.name)
        return [*audit_checks.positions(account), *audit_checks.windows(account), *audit_checks.states(account)]

    def take_all(self) -> list[ScoredWindow]:
        """All documents on the stream that were not taken yet."""
        found = []
        for entry in self.stream.read(count=10_000, block_s=0.01):
            assert not isinstance(entry, BrokenEntry)
            found.append(entry.window)
        return found


@contextlib.asynccontextmanager
async def collecting(settings: Settings, secrets: Secrets | None = None) -> AsyncIterator[asyncio.Task[None]]:
    """A running collector, cancelled (as SIGTERM does) in the end."""
    task = asyncio.create_task(run_collector(settings, secrets or Secrets()))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=20)


async def until(condition: Callable[[], bool], *, task: asyncio.Task[None], timeout_s: float = 30) -> None:
    """Wait for the condition; a collector that ends before raises its error."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if task.done():
            task.result()
        assert time.monotonic() < deadline, "the collector did not get there in time"
        await asyncio.sleep(0.05)


def beside(settings: Settings, story: Callable[[asyncio.Task[None]], Awaitable[T]]) -> T:
    """Run `story(task of the collector)` beside a collector."""

    async def run() -> T:
        async with collecting(settings) as task:
            return await story(task)

    return asyncio.run(run())


def collect_all(settings: Settings, secrets: Secrets | None = None) -> Seen:
    """Run a collector until its source is exhausted."""
    seen = Seen(settings)

    async def run() -> None:
        async with collecting(settings, secrets) as task:
            await until(lambda: seen.exhausted, task=task)

    asyncio.run(run())
    return seen
