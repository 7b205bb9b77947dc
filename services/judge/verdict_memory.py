"""Remembers what engine calls said, so that a request that is asked again pays only for what is missing.

    answers = await memory.recall(key, lambda: ask_the_engine())    # asks unless it knows, or somebody is asking

Two who ask the same at once share one call. It is cancelled when nobody waits for it any more.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared import metrics

if TYPE_CHECKING:
    from services.judge.verdicts import Answers


@dataclass
class _Shared:
    """A call under way."""

    task: "asyncio.Task[Answers]"
    num_waiting: int = 0


class VerdictMemory:
    """Bounded: what was least recently asked for goes first. Belongs to one event loop."""

    def __init__(self, capacity: int) -> None:
        """In engine calls; 0 remembers none."""
        self._capacity = capacity
        self._known: OrderedDict[bytes, Answers] = OrderedDict()
        self._under_way: dict[bytes, _Shared] = {}

    def __len__(self) -> int:
        return len(self._known)

    async def recall(self, key: bytes, ask: "Callable[[], Coroutine[Any, Any, Answers]]") -> "Answers":
        """`key` stands for all that decides the answer. What is remembered has lost its reasoning, which is long."""
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            metrics.judge_remembered_total.inc()
            return known
        shared = self._under_way.get(key)
        if shared is None:
            shared = self._under_way[key] = _Shared(asyncio.create_task(self._ask(key, ask)))
        return await self._wait_for(shared, key)

    async def _ask(self, key: bytes, ask: "Callable[[], Coroutine[Any, Any, Answers]]") -> "Answers":
        answers = await ask()
        if "refused" not in answers.causes:  # told at once again, and maybe otherwise
            self._remember(key, replace(answers, reasoning=""))
        return answers

    def _remember(self, key: bytes, answers: "Answers") -> None:
        self._known[key] = answers
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    async def _wait_for(self, shared: _Shared, key: bytes) -> "Answers":
        shared.num_waiting += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.num_waiting -= 1
            if not shared.num_waiting:
                await self._end(shared, key)

    async def _end(self, shared: _Shared, key: bytes) -> None:
        """The last one leaves: with its answer, or because it was cancelled."""
        if self._under_way.get(key) is shared:
            del self._under_way[key]  # before the task has ended: who asks now must not share its cancellation
        if not shared.task.done():
            shared.task.cancel()
            await asyncio.wait({shared.task})
        if not shared.task.cancelled():
            shared.task.exception()  # seen: asyncio does not report it
