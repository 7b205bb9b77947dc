"""Who asks the engine when, and what becomes of calls that fail or are not wanted any more."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.engine.base import Sampling
from services.judge.asker import Asker
from shared import metrics
from shared.errors import EngineError, HeadwaterError, OverloadedError, PromptError, RequestError
from tests.services.fakes import FakeEngine
from tests.services.judge.questions import Asked

SAMPLING = Sampling(max_tokens=4)


@dataclass
class Desk:
    """Work whose calls last until they are told their result, by name."""

    begun: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    _ends: dict[str, "asyncio.Future[str]"] = field(default_factory=dict)

    def work(self, name: str) -> Callable[[], Awaitable[str]]:
        async def call() -> str:
            self.begun.append(name)
            self._ends[name] = asyncio.get_running_loop().create_future()
            try:
                return await self._ends[name]
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise

        return call

    async def finish(self, name: str, error: HeadwaterError | None = None) -> None:
        if error:
            self._ends[name].set_exception(error)
        else:
            self._ends[name].set_result(f"{name}!")
        await settled()


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def make_asker(*, max_at_once: int = 10, patience_s: float = 60.0, engine: FakeEngine | None = None) -> Asker:
    return Asker(engine or FakeEngine(), max_at_once=max_at_once, patience_s=patience_s)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_calls_run_in_order_of_their_turn_and_so_many_at_once() -> None:
    async def story() -> None:
        asker, desk = make_asker(max_at_once=2), Desk()
        calls = [asyncio.create_task(asker.call(desk.work(f"{turn}{name}"), turn=turn)) for turn, name in [*PLACES]]
        await settled()
        assert desk.begun == ["5a", "5b"]  # they came first, and found room
        for name in ("5b", "5a", "1d", "1e"):
            await desk.finish(name)
        assert desk.begun == ["5a", "5b", "1d", "1e", "3c", "9f"]
        await desk.finish("3c")
        await desk.finish("9f")
        assert await asyncio.gather(*calls) == ["5a!", "5b!", "3c!", "1d!", "1e!", "9f!"]

    PLACES = [(5, "a"), (5, "b"), (3, "c"), (1, "d"), (1, "e"), (9, "f")]
    run(story())


def test_a_prompt_is_built_when_its_turn_has_come() -> None:
    async def story() -> None:
        asker, desk, prompt = make_asker(max_at_once=1), Desk(), Asked("Why?")
        first = asyncio.create_task(asker.call(desk.work("first"), turn=0))
        second = asyncio.create_task(asker.generate(prompt, SAMPLING, turn=0))
        await settled()
        assert prompt.num_built == 0
        await desk.finish("first")
        assert [generation.text for generation in await second] == ["answer 0"]
        assert (await first, prompt.num_built) == ("first!", 1)

    run(story())


def test_who_is_cancelled_in_the_line_never_reaches_the_engine() -> None:
    async def story() -> None:
        asker, desk = make_asker(max_at_once=1), Desk()
        first, second, third = (asyncio.create_task(asker.call(desk.work(name), turn=0)) for name in "abc")
        await settled()
        second.cancel()
        await desk.finish("a")
        await desk.finish("c")
        assert (await first, await third) == ("a!", "c!")
        assert desk.begun == ["a", "c"]

    before = waiting()
    run(story())
    assert waiting() == before


def waiting() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_judge_waiting_questions") or 0.0


def test_who_is_cancelled_in_the_engine_leaves_it_and_frees_the_place() -> None:
    async def story() -> None:
        asker, desk = make_asker(max_at_once=1), Desk()
        first, second = (asyncio.create_task(asker.call(desk.work(name), turn=0)) for name in "ab")
        await settled()
        first.cancel()
        await settled()
        assert (desk.cancelled, desk.begun) == (["a"], ["a", "b"])
        await desk.finish("b")
        assert await second == "b!"

    run(story())


def test_a_place_that_was_given_to_a_cancelled_call_goes_to_the_next() -> None:
    """Let in and cancelled before it ran again."""

    async def story() -> None:
        asker, desk = make_asker(max_at_once=1), Desk()
        first, second, third = (asyncio.create_task(asker.call(desk.work(name), turn=0)) for name in "abc")
        await settled()
        first.cancel()
        await asyncio.sleep(0)  # the first leaves and lets the second in, which has not run yet
        second.cancel()
        await settled()
        await desk.finish("c")
        assert await third == "c!"

    run(story())


@pytest.mark.parametrize("error", [EngineError("out of memory"), OverloadedError("full")])
def test_a_failed_call_is_tried_again_without_its_siblings(error: HeadwaterError) -> None:
    answers: dict[str, list[str | Exception]] = {"one": [error, "Fine."], "two": ["Good."]}
    engine = FakeEngine(answer=lambda prompt, index: answers[prompt].pop(0))

    async def story() -> None:
        asker = make_asker(engine=engine)
        found = await asyncio.gather(*(asker.generate(Asked(text), SAMPLING, turn=0) for text in ("one", "two")))
        assert [generation.text for (generation,) in found] == ["Fine.", "Good."]

    before = metrics.REGISTRY.get_sample_value("headwater_judge_engine_retries_total") or 0.0
    run(story())
    assert engine.prompts == ["one", "two", "one"]
    assert metrics.REGISTRY.get_sample_value("headwater_judge_engine_retries_total") == before + 1


def test_a_call_that_failed_goes_before_older_requests() -> None:
    async def story() -> None:
        asker, desk = make_asker(max_at_once=1), Desk()
        failing = asyncio.create_task(asker.call(desk.work("failing"), turn=5))
        await settled()
        others = [asyncio.create_task(asker.call(desk.work(name), turn=0)) for name in "ab"]
        await desk.finish("failing", EngineError("a hiccup"))
        assert desk.begun == ["failing", "a"]  # the place is not held while it waits
        await asyncio.sleep(0.4)  # it waits 0.125 to 0.25 s
        await desk.finish("a")
        assert desk.begun == ["failing", "a", "failing"]
        await desk.finish("failing")
        await desk.finish("b")
        assert [await call for call in (failing, *others)] == ["failing!", "a!", "b!"]

    run(story())


@pytest.mark.parametrize("error", [PromptError("too long"), RequestError("a content filter")])
def test_what_the_engine_refuses_is_not_tried_again(error: HeadwaterError) -> None:
    engine = FakeEngine(answer=lambda prompt, index: error)

    async def story() -> None:
        with pytest.raises(type(error), match=str(error)):
            await make_asker(engine=engine).generate(Asked("x"), SAMPLING, turn=0)

    run(story())
    assert engine.num_generate_calls == 1


def test_after_the_patience_the_engine_s_error_is_raised() -> None:
    engine = FakeEngine(answer=lambda prompt, index: EngineError("out of memory"))

    async def story() -> None:
        with pytest.raises(EngineError, match="out of memory"):
            await make_asker(engine=engine, patience_s=0.3).generate(Asked("x"), SAMPLING, turn=0)

    run(story())
    assert engine.num_generate_calls in (3, 4)  # at once, after 0.125 to 0.25 s, and at the end of the patience


@dataclass
class Switch:
    """Work that fails while the engine is off."""

    is_on: bool = False
    num_calls: int = 0

    async def call(self) -> str:
        self.num_calls += 1
        await asyncio.sleep(0)
        if not self.is_on:
            raise EngineError("connection refused")
        return "answer"


def test_all_give_up_an_engine_that_is_down_together() -> None:
    """500 questions and 4 places: one after another, each would have its own patience. 8 failures show that the engine
    is down; then one call at a time tries it."""

    async def story() -> None:
        asker, switch = make_asker(max_at_once=4, patience_s=0.5), Switch()
        calls = [asker.call(switch.call, turn=turn) for turn in range(500)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert {str(error) for error in found if isinstance(error, EngineError)} == {"connection refused"}
        assert len(found) == 500
        assert 8 <= switch.num_calls <= 8 + 3 + 8  # those in the engine then, and a few that try

    run(story())


def test_an_engine_that_was_given_up_is_tried_by_the_next_request_and_all_go_on() -> None:
    async def story() -> None:
        asker, switch = make_asker(max_at_once=4, patience_s=0.0), Switch()
        await asyncio.gather(*(asker.call(switch.call, turn=0) for _ in range(20)), return_exceptions=True)
        num_calls = switch.num_calls
        again = await asyncio.gather(*(asker.call(switch.call, turn=1) for _ in range(20)), return_exceptions=True)
        assert (switch.num_calls, {type(error) for error in again}) == (num_calls + 1, {EngineError})
        switch.is_on = True
        assert await asyncio.gather(*(asker.call(switch.call, turn=2) for _ in range(20))) == ["answer"] * 20

    run(story())


def test_an_engine_that_comes_back_in_time_answers_everybody() -> None:
    async def story() -> None:
        asker, switch = make_asker(max_at_once=4), Switch()
        calls = [asyncio.create_task(asker.call(switch.call, turn=turn)) for turn in range(50)]
        await settled()
        assert switch.num_calls >= 8
        switch.is_on = True
        assert await asyncio.gather(*calls) == ["answer"] * 50

    run(story())


def test_a_cancelled_trial_lets_the_next_one_try() -> None:
    async def story() -> None:
        asker, switch, desk = make_asker(patience_s=0.0), Switch(), Desk()
        await asyncio.gather(*(asker.call(switch.call, turn=0) for _ in range(8)), return_exceptions=True)
        trial, follower = (asyncio.create_task(asker.call(desk.work(name), turn=0)) for name in ("trial", "follower"))
        await settled()
        assert desk.begun == ["trial"]
        trial.cancel()
        await settled()
        await desk.finish("follower")
        assert await follower == "follower!"

    run(story())


def test_no_sample_at_all_is_a_failure_of_the_engine() -> None:
    class Mute(FakeEngine):
        async def generate(self, *given: Any) -> Any:
            return [[]]

    async def story() -> None:
        with pytest.raises(EngineError, match="with no sample at all"):
            await make_asker(engine=Mute(), patience_s=0.0).generate(Asked("x"), SAMPLING, turn=0)

    run(story())


def test_scores_are_asked_for_in_the_same_way() -> None:
    engine = FakeEngine(log_probs=lambda prompt, label: [-1.0, -2.0] if label == " A" else [-3.0])

    async def story() -> None:
        found = await make_asker(engine=engine).score(Asked("Which?"), [" A", " B"], turn=0)
        assert found == [[-1.0, -2.0], [-3.0]]

    run(story())
    assert engine.prompts == ["Which?"]
