"""What is remembered, what is forgotten, and who shares a call."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from services.judge.verdict_memory import VerdictMemory
from services.judge.verdicts import Answers, Cause
from shared import metrics
from shared.errors import EngineError

YES = Answers((1.0,), graded=False, reasoning="It is.\nVerdict: safe")


class Calls:
    """Engine calls that last until they are let go."""

    def __init__(self, answers: Answers = YES) -> None:
        self.answers = answers
        self.num_begun = self.num_cancelled = 0
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def ask(self) -> Answers:
        self.num_begun += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error:
            raise self.error
        return self.answers


def run(story: Callable[[VerdictMemory], Coroutine[Any, Any, None]], *, capacity: int = 10) -> None:
    asyncio.run(asyncio.wait_for(story(VerdictMemory(capacity)), 30))


def remembered() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_judge_remembered_total") or 0.0


def test_a_finished_call_is_not_made_again_and_has_lost_its_reasoning() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        calls.may_end.set()
        assert await memory.recall(b"one", calls.ask) == YES
        assert await memory.recall(b"one", calls.ask) == Answers((1.0,), graded=False)
        assert await memory.recall(b"two", calls.ask) == YES
        assert calls.num_begun == 2

    before = remembered()
    run(story)
    assert remembered() == before + 1


def test_what_was_least_recently_asked_for_is_forgotten_first() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        calls.may_end.set()
        for key in (b"a", b"b", b"a", b"c"):  # b goes when c comes
            await memory.recall(key, calls.ask)
        assert (len(memory), calls.num_begun) == (2, 3)
        await memory.recall(b"a", calls.ask)
        assert calls.num_begun == 3
        await memory.recall(b"b", calls.ask)
        assert calls.num_begun == 4

    run(story, capacity=2)


@pytest.mark.parametrize(("cause", "num_begun"), [("unreadable", 1), ("truncated", 1), ("refused", 2)])
def test_unread_answers_are_remembered_and_refusals_are_not(cause: Cause, num_begun: int) -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls(Answers((), graded=False, causes=(cause,)))
        calls.may_end.set()
        for _ in range(2):
            assert (await memory.recall(b"one", calls.ask)).causes == (cause,)
        assert calls.num_begun == num_begun

    run(story)


def test_nothing_is_remembered_of_a_call_that_failed() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        calls.may_end.set()
        calls.error = EngineError("out of memory")
        with pytest.raises(EngineError, match="out of memory"):
            await memory.recall(b"one", calls.ask)
        calls.error = None
        assert await memory.recall(b"one", calls.ask) == YES

    run(story)


def test_two_who_ask_the_same_at_once_share_a_call_and_its_end() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        first, second = (asyncio.create_task(memory.recall(b"one", calls.ask)) for _ in range(2))
        await asyncio.sleep(0)
        calls.may_end.set()
        assert (await first, await second, calls.num_begun) == (YES, YES, 1)

    run(story)


def test_a_shared_call_ends_when_nobody_waits_for_it_any_more() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        first, second = (asyncio.create_task(memory.recall(b"one", calls.ask)) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait({first})
        assert calls.num_cancelled == 0
        second.cancel()
        await asyncio.wait({second})
        assert (calls.num_begun, calls.num_cancelled, len(memory)) == (1, 1, 0)

    run(story)


def test_who_asks_while_a_call_is_being_cancelled_gets_one_of_their_own() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        first = asyncio.create_task(memory.recall(b"one", calls.ask))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)  # the first is leaving
        second = asyncio.create_task(memory.recall(b"one", calls.ask))
        calls.may_end.set()
        assert await second == YES
        assert first.cancelled()

    run(story)


def test_a_failure_reaches_everybody_who_waits() -> None:
    async def story(memory: VerdictMemory) -> None:
        calls = Calls()
        waiting = [asyncio.create_task(memory.recall(b"one", calls.ask)) for _ in range(3)]
        await asyncio.sleep(0)
        calls.error = EngineError("out of memory")
        calls.may_end.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [str(error) for error in found] == ["out of memory"] * 3

    run(story)
