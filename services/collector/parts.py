"""The work on one leased part of the source: redo what an earlier collector left unfinished, then read on.

    unfinished windows -> read on -> (end of the source) next epoch ... -> mark the part exhausted

One loop per part reads; every window is then its own task. The loop blocks at the gate (gate.py) until a window leaves
or the trainer reads. Called by leases.py, which cancels it when the lease is lost.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from services.collector.clients import Services
from services.collector.collect import DroppedWindow, collect
from services.collector.gate import Gate, RunWatch
from services.collector.probes import Prober
from services.collector.sources.base import Document, Refusal
from services.collector.sources.source import Source
from services.collector.storage import Storage
from services.collector.streak import Streak
from services.collector.windows import Window, WindowMaker, WindowText
from services.concurrency import first_error
from shared import metrics
from shared.errors import SourceError
from shared.ledger import Position
from shared.records import Lease, WindowKey
from shared.runs import ShownText
from shared.settings import Settings

_log = logging.getLogger(__name__)


@dataclass
class PartWorker:
    """Shared by all parts of a collector; `run` works on one part."""

    settings: Settings
    source: Source
    maker: WindowMaker
    services: Services
    storage: Storage
    prober: Prober
    gate: Gate
    watch: RunWatch
    extent: str
    """What the end of a part is true for (Run.extent)."""
    # Not the event loop's threads: it waits for those when it closes, and a source may hang.
    _streak: Streak = field(init=False)
    _tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))
    _reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "source"))

    def __post_init__(self) -> None:
        self._streak = Streak(self.settings.collector.max_dropped_windows, self._drop)

    async def run(self, lease: Lease) -> None:
        """Until the part has no more documents. Raises SourceError if the source gave no usable document at all,
        CollectingError if too many windows in a row can't be scored, and FencedError once another collector has taken
        the part."""
        try:
            async with asyncio.TaskGroup() as windows:
                await self._redo(lease, windows)
                await self._read_on(lease, windows)
            await self._streak.end_part(lease)
        except BaseExceptionGroup as failures:
            raise first_error(failures) from failures
        finally:
            self._streak.forget(lease)
        await self._end(lease)

    async def _redo(self, lease: Lease, windows: asyncio.TaskGroup) -> None:
        part, left = lease.part, await self.storage.left_over(lease)
        if left:
            _log.info("part %d: %d unfinished positions, working on them again", part, len(left))
        for epoch in sorted({position.epoch for position in left}):
            wanted = {position.position: found for position, found in left.items() if position.epoch == epoch}
            async for item in self._items(part, epoch, min(wanted)):
                if item.position in wanted:
                    await self._redo_one(item, lease, epoch, wanted.pop(item.position), windows)
                if not wanted:
                    break
            for position, numbers in wanted.items():
                await self._drop_missing(lease, epoch, position, numbers)

    async def _redo_one(
        self, item: Document | Refusal, lease: Lease, epoch: int, numbers: set[int], windows: asyncio.TaskGroup
    ) -> None:
        await self._refuse_another_record(item, lease.part, epoch)
        prepared = [] if isinstance(item, Refusal) else await self._prepare(item, lease.part, epoch)
        for window in prepared:
            if window.key.window in numbers:
                await self._start(window, lease, windows)
        gone = numbers - {window.key.window for window in prepared}
        await self._drop_missing(lease, epoch, item.position, gone)

    async def _refuse_another_record(self, item: Document | Refusal, part: int, epoch: int) -> None:
        found = item.place if isinstance(item, Refusal) else item.source_id
        position = Position(epoch, item.position)
        before = await self.storage.in_database(self.storage.ledger.source_id, part, position)
        if found != before:
            where = f"position {item.position} of part {part} in epoch {epoch}"
            raise SourceError(
                f"{where} was {before!r} when it was first read and is {found!r} now: the documents have changed. "
                "Put them back, or start a new run with --run.name NAME"
            )

    async def _drop_missing(self, lease: Lease, epoch: int, position: int, numbers: set[int]) -> None:
        for number in sorted(numbers):
            key = WindowKey(part=lease.part, epoch=epoch, position=position, window=number)
            detail = f"window {key} was read before, but the source or its settings have changed: it is gone"
            await self.storage.drop(key, lease, reason="source_changed", detail=detail, source_id="")

    async def _read_on(self, lease: Lease, windows: asyncio.TaskGroup) -> None:
        position = await self.storage.in_database(self.storage.ledger.next_position, lease.part)
        max_epochs = self.settings.documents.max_epochs
        while not max_epochs or position.epoch < max_epochs:
            found = await self._read_epoch(lease, position, windows)
            if position.position == 0 and not found["window"]:
                what = dict(found) or "it is empty"
                _log.warning("part %d has no usable document in a whole epoch: %s", lease.part, what)
                return
            position = Position(position.epoch + 1, 0)

    async def _read_epoch(self, lease: Lease, start: Position, windows: asyncio.TaskGroup) -> Counter[str]:
        """How many windows, and refusals by reason, the rest of the epoch gave."""
        found: Counter[str] = Counter()
        async for item in self._items(lease.part, start.epoch, start.position):
            if isinstance(item, Refusal):
                await self._refuse(item, lease, start.epoch)
                found[item.reason] += 1
                continue
            prepared = await self._prepare(item, lease.part, start.epoch)
            if not prepared:
                await self._refuse(_too_short(item), lease, start.epoch)
                found["too_short"] += 1
                continue
            await self.storage.begin(prepared, lease)
            found["window"] += len(prepared)
            for window in prepared:
                await self._start(window, lease, windows)
        return found

    async def _items(self, part: int, epoch: int, start: int) -> AsyncIterator[Document | Refusal]:
        items = self.source.read(part, epoch=epoch, start=start)
        while True:
            await self.gate.wait_open()
            item = await asyncio.get_running_loop().run_in_executor(self._reading, next, items, None)
            if item is None:
                return
            yield item

    async def _prepare(self, document: Document, part: int, epoch: int) -> list[Window]:
        make = partial(self.maker.windows, document, part=part, epoch=epoch)
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, make)

    async def _refuse(self, item: Refusal, lease: Lease, epoch: int) -> None:
        key = WindowKey(part=lease.part, epoch=epoch, position=item.position, window=0)
        metrics.windows_read_total.inc()
        await self.storage.drop(key, lease, reason=item.reason, detail=item.detail, source_id=item.place)

    async def _start(self, window: Window, lease: Lease, windows: asyncio.TaskGroup) -> None:
        await self.gate.enter()
        windows.create_task(self._work(window, lease), name=f"window-{window.key}")

    async def _work(self, window: Window, lease: Lease) -> None:
        """Leaves the gate only after the ledger knows the window's outcome."""
        try:
            show = partial(self.maker.tokenizer.show, window.token_ids, window.chunks)
            text = await asyncio.get_running_loop().run_in_executor(self._tokenizing, show)
            stage = self.settings.collector.stage_at(self.watch.step)
            outcome = await collect(window, text, stage=stage, services=self.services, settings=self.settings)
            if not isinstance(outcome, DroppedWindow):
                outcome = outcome.model_copy(update={"probes": await self.prober.probe(window, text)})
                await self.storage.write(outcome, lease)
                self.gate.note_written()
                await self.storage.finish(outcome, lease, shown=shown_text(window, text))
                await self._streak.end()
            elif outcome.is_in_vain:
                self._streak.hold(window, lease, outcome)
            else:
                await self._drop(window, lease, outcome)
        finally:
            self.gate.leave()

    async def _drop(self, window: Window, lease: Lease, outcome: DroppedWindow) -> None:
        reason, detail = outcome.reason, outcome.detail
        await self.storage.drop(window.key, lease, reason=reason, detail=detail, source_id=window.source_id)

    async def _end(self, lease: Lease) -> None:
        storage, coordination = self.storage, self.storage.coordination
        balance = await storage.in_database(storage.ledger.balance)
        ended = await storage.in_redis(coordination.exhausted_parts, extent=self.extent)
        is_last = ended | {lease.part} >= set(range(self.settings.documents.num_parts))
        if is_last and balance.read == sum(balance.dropped.values()):
            raise SourceError(
                f"documents.path = {self.settings.documents.path!r} gave no usable document: "
                f"{balance.read} read, dropped {balance.dropped}"
            )
        await storage.in_redis(coordination.mark_exhausted, lease, extent=self.extent)
        _log.info("part %d has no more documents", lease.part)

    def close(self) -> None:
        for executor in (self._tokenizing, self._reading):
            executor.shutdown(wait=False, cancel_futures=True)


def shown_text(window: Window, text: WindowText) -> ShownText:
    spans = {chunk.start: (span.start, span.end) for chunk, span in zip(window.chunks, text.spans, strict=True)}
    return ShownText(text.text, spans)


def _too_short(document: Document) -> Refusal:
    name = document.source_id
    detail = f"document {name!r} is too short for one chunk (chunks.min_prefix_tokens, min_suffix_tokens)"
    return Refusal(document.position, name, "too_short", detail)
