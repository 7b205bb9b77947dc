"""Requests that are asked again, and those that nobody waits for any more, over the whole judge."""

import asyncio
from typing import Any

import pytest

from services.judge.judge import Judge
from shared.api import JudgementRequest
from shared.errors import EngineError
from shared.records import Judgement
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import judgement_of, make_judge, make_window

CRITERIA = {"safety": {"samples": 1}, "factuality": {"samples": 1}}
WINDOW = make_window(" x", " y", " z")


def failing_once(number: int) -> FakeEngine:
    """Its call `number`, counted from 1, fails. One verdict of each criterion fits every prompt."""

    def answer(prompt: str, _index: int) -> str | Exception:
        if engine.num_generate_calls == number:
            return EngineError("out of memory")
        return "Verdict: safe" if "Verdict: safe" in prompt else "Verdict: none"

    engine = FakeEngine(answer=answer)
    return engine


def test_one_failed_call_does_not_restart_its_siblings() -> None:
    engine = failing_once(4)
    judgement = asyncio.run(judgement_of(make_judge(engine, criteria=CRITERIA, engine_patience_s=10), WINDOW))
    assert judgement.rewards == (1.0, 1.0, 1.0)
    assert (engine.num_generate_calls, judgement.num_calls) == (7, 6)


def test_a_request_that_is_asked_again_pays_only_for_the_rest() -> None:
    """The last of 6 calls fails. The next request makes this one; the one after none."""
    engine = failing_once(6)

    async def story() -> None:
        judge = make_judge(engine, criteria=CRITERIA, engine_patience_s=0.0)
        with pytest.raises(EngineError, match="out of memory"):
            await judge.judge(WINDOW)
        assert (await judgement_of(judge, WINDOW)).num_calls == 1
        assert (await judgement_of(judge, WINDOW)).num_calls == 0
        assert (await judgement_of(judge, WINDOW.model_copy(update={"seed": 1}))).num_calls == 6

    asyncio.run(story())
    assert engine.num_generate_calls == 6 + 1 + 6


class Stuck(FakeEngine):
    """Never answers, and counts the calls that are in it."""

    num_inside = 0

    async def generate(self, *given: Any) -> Any:
        self.num_inside += 1
        try:
            await asyncio.sleep(3600)
        finally:
            self.num_inside -= 1


async def _inside(judge: Judge, engine: Stuck, request: JudgementRequest, *, num_inside: int) -> "asyncio.Task[Any]":
    task = asyncio.create_task(judge.judge(request))
    async with asyncio.timeout(10):
        while engine.num_inside < num_inside:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return task


def test_a_request_that_nobody_waits_for_leaves_the_engine() -> None:
    async def story() -> None:
        engine = Stuck()
        judge = make_judge(engine, criteria=CRITERIA)
        task = await _inside(judge, engine, WINDOW, num_inside=6)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_inside == 0

    asyncio.run(story())


def test_a_request_that_is_sent_twice_at_once_is_asked_once() -> None:
    async def story() -> list[Judgement]:
        judge = make_judge(engine, criteria=CRITERIA)
        return list(await asyncio.gather(*(judgement_of(judge, WINDOW) for _ in range(2))))

    engine = FakeEngine(answer=lambda prompt, _: "Verdict: safe" if "Verdict: safe" in prompt else "Verdict: none")
    first, second = asyncio.run(story())
    assert first.rewards == second.rewards == (1.0, 1.0, 1.0)
    assert engine.num_generate_calls == 6
