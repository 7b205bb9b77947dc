"""Asking for verdicts: retries, causes, grades, and what is remembered."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from services.engine.base import Generation, Prompt, Sampling, WordOdds
from services.judge.verdict_memory import VerdictMemory
from services.judge.verdicts import Answers, CallCount, LabelVerdict, retry_temperature
from shared.errors import EngineError, HeadwaterError, PromptError, RequestError, SettingsError
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import answering
from tests.services.judge.questions import answer_verdict, ask, make_asker


def scripted(*answers: str | Exception) -> FakeEngine:
    """Gives its answers in their order."""
    left = iter(answers)
    return FakeEngine(answer=lambda prompt, index: next(left))


class Writing(FakeEngine):
    """Changes each generation before it is given."""

    change: Callable[[Generation], Generation]

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        rows = await super().generate(prompts, sampling)
        return [[self.change(generation) for generation in row] for row in rows]


def writing(text: str, /, *, graded: bool = False, **fields: Any) -> Writing:
    engine = Writing(answer=lambda prompt, index: text, can_grade=graded, can_constrain=True)
    engine.change = lambda generation: replace(generation, **fields)
    return engine


def test_every_sample_is_a_verdict() -> None:
    count = CallCount("safety")
    engine = scripted("Fine.\nVerdict: safe", "Verdict: unsafe", "Verdict: safe")
    answers = ask(answer_verdict(engine), num_samples=3, count=count)
    assert answers == Answers((1.0, 0.0, 1.0), graded=False, reasoning="Fine.\nVerdict: safe")
    assert answers.mean == pytest.approx(2 / 3)
    assert (count.num_calls, count.num_failures, engine.num_generate_calls) == (3, 0, 1)


def test_an_unreadable_verdict_is_asked_again_with_another_seed_and_temperature() -> None:
    count = CallCount("safety")
    engine = scripted("hm", "Verdict: safe", "Verdict: maybe", "Verdict: unsafe", "Verdict: safe")
    answers = ask(answer_verdict(engine, temperature=0.0, max_retries=1), num_samples=3, count=count)
    assert (answers.values, answers.causes) == ((1.0, 0.0, 1.0), ())
    assert (count.num_calls, count.num_failures) == (5, 2)
    assert [(asked.num_samples, asked.temperature) for asked in engine.samplings] == [(3, 0.0), (2, 0.5)]
    assert engine.samplings[0].seed != engine.samplings[1].seed


def test_after_all_retries_a_verdict_is_missing_with_its_cause() -> None:
    count = CallCount("safety")
    engine = scripted("Verdict: safe", "hm", "hm", "hm")
    answers = ask(answer_verdict(engine, max_retries=2), num_samples=2, count=count)
    assert (answers.values, answers.causes, answers.mean) == ((1.0,), ("unreadable",), 1.0)
    assert (count.num_calls, count.num_failures) == (4, 3)
    assert len({asked.temperature for asked in engine.samplings}) == 3


def test_no_verdict_at_all_has_no_mean() -> None:
    assert ask(answer_verdict(answering("hm")), num_samples=2).mean is None


@pytest.mark.parametrize("temperature", [0.0, 0.5, 0.8, 1.0, 1.5])
def test_a_retry_never_has_the_first_temperature_and_stays_below_one(temperature: float) -> None:
    assert retry_temperature(temperature, 0) == temperature
    retries = [retry_temperature(temperature, retry) for retry in range(1, 4)]
    assert len({temperature, *retries}) == 4
    assert all(0.0 < retry < 1.0 for retry in retries)


def test_an_answer_that_was_cut_off_is_no_verdict() -> None:
    engine = writing("I first lean to Verdict: safe. However, looking", finish_reason="length")
    answers = ask(answer_verdict(engine))
    assert (answers.values, answers.causes) == ((), ("truncated",))


@pytest.mark.parametrize(
    ("text", "values"), [("So.\nVerdict: safe", (1.0,)), ("Verdict: safe. But", ()), ("So.\nVerdict: un", ())]
)
def test_a_structured_answer_of_full_length_counts_if_its_end_is_there(text: str, values: tuple[float, ...]) -> None:
    engine = writing(text, finish_reason="length")
    assert ask(answer_verdict(engine, verdict="structured")).values == values


def test_thoughts_are_no_verdict() -> None:
    engine = scripted(
        "<think>Verdict: safe</think>\nVerdict: unsafe", "<think>Verdict: safe", "Hm</think>Verdict: safe"
    )
    answers = ask(answer_verdict(engine), num_samples=3)
    assert (answers.values, answers.causes) == ((0.0, 1.0), ("unreadable",))


@pytest.mark.parametrize("error", [PromptError("too long"), RequestError("a content filter")])
def test_a_refused_prompt_is_not_asked_again(error: HeadwaterError) -> None:
    count = CallCount("safety")
    engine = scripted(error)
    answers = ask(answer_verdict(engine, max_retries=3), num_samples=2, count=count)
    assert (answers.values, answers.causes) == ((), ("refused", "refused"))
    assert (engine.num_generate_calls, count.num_failures) == (1, 2)


def test_a_failing_engine_is_an_error_and_no_missing_verdict() -> None:
    with pytest.raises(EngineError, match="out of memory"):
        ask(answer_verdict(scripted(EngineError("out of memory"))))


class Meagre(FakeEngine):
    """Gives one sample, whatever it is asked for."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        rows = await super().generate(prompts, sampling)
        return [row[:1] for row in rows]


def test_fewer_samples_than_asked_for_are_asked_for_again() -> None:
    """Without using up retries: 3 calls although none is allowed."""
    count = CallCount("safety")
    engine = Meagre(answer=lambda prompt, index: "Verdict: safe")
    assert ask(answer_verdict(engine), num_samples=3, count=count).values == (1.0, 1.0, 1.0)
    assert [asked.num_samples for asked in engine.samplings] == [3, 2, 1]
    assert len({asked.seed for asked in engine.samplings}) == 3
    assert count.num_calls == 3


def test_sampling_follows_the_settings() -> None:
    engine = answering("Verdict: safe")
    criterion: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.9,
        "max_answer_tokens": 7,
        "lora_adapter": "/adapters/safety",
    }
    ask(answer_verdict(engine, **criterion), num_samples=2)
    asked = engine.samplings[0]
    assert (asked.num_samples, asked.temperature, asked.top_p, asked.max_tokens) == (2, 0.3, 0.9, 7)
    assert (asked.pattern, asked.words, asked.adapter) == ("", (), "/adapters/safety")


def test_a_structured_verdict_is_asked_for_with_a_pattern_and_room_for_it() -> None:
    """32 characters of 4 bytes at most, then the longest last line: 128 + len("\\nVerdict: unsafe")."""
    engine = answering("So.\nVerdict: safe", can_constrain=True)
    assert ask(answer_verdict(engine, verdict="structured", max_answer_tokens=8)).values == (1.0,)
    (asked,) = engine.samplings
    assert asked.max_tokens == 128 + 16
    assert re.fullmatch(asked.pattern, "So.\nVerdict: safe")
    assert not re.fullmatch(asked.pattern, "So.")


def odds(start: int, *shares: float) -> WordOdds:
    """Of safe, Safe, unsafe, Unsafe."""
    return WordOdds(start, tuple(math.log(share) if share else -math.inf for share in shares))


def test_a_sample_is_graded_at_its_verdict() -> None:
    """p(safe) = (0.5 + 0.1) / (0.5 + 0.1 + 0.2) = 0.75."""
    text = "<think>safe?</think>Verdict: safe"
    engine = writing(text, graded=True, word_odds=(odds(7, 1, 0, 0, 0), odds(29, 0.5, 0.1, 0.2, 0)))
    source = answer_verdict(engine)
    answers = ask(source)
    assert answers.mean == pytest.approx(0.75)
    assert answers.graded
    assert source.grades
    assert engine.samplings[0].words == ("safe", "Safe", "unsafe", "Unsafe")


def test_a_sample_whose_verdict_has_no_odds_counts_as_its_word() -> None:
    answers = ask(answer_verdict(writing("Verdict: safe", graded=True)))
    assert (answers.values, answers.graded) == ((1.0,), False)


@pytest.mark.parametrize(("can_grade", "graded"), [(False, True), (True, False)])
def test_grades_need_an_engine_that_gives_them_and_the_setting(can_grade: bool, graded: bool) -> None:
    engine = answering("Verdict: safe", can_grade=can_grade)
    source = answer_verdict(engine, graded=graded)
    assert not ask(source).graded
    assert not source.grades
    assert engine.samplings[0].words == ()


def test_a_question_that_is_asked_again_pays_only_for_what_is_missing() -> None:
    """The first call gave one of two verdicts, then the engine failed."""
    memory = VerdictMemory(10)
    engine = scripted("Verdict: safe", "hm", EngineError("out of memory"), "Verdict: unsafe")
    source = answer_verdict(engine, memory=memory, max_retries=1)
    with pytest.raises(EngineError):
        ask(source, num_samples=2)
    count = CallCount("safety")
    assert ask(source, num_samples=2, count=count).values == (1.0, 0.0)
    assert (engine.num_generate_calls, count.num_calls) == (3, 1)
    assert ask(source, num_samples=2).values == (1.0, 0.0)
    assert engine.num_generate_calls == 3


def test_another_question_is_another_call() -> None:
    """By its prompt, seed, samples, verdict words, settings and engine."""
    memory, engine = VerdictMemory(100), answering("Verdict: safe")
    source = answer_verdict(engine, memory=memory)
    for _ in range(2):
        ask(source)
        ask(source, text="Is that safe?")
        ask(source, seed=8)
        ask(source, num_samples=2)
        ask(answer_verdict(engine, {"safe": 0.9, "unsafe": 0.0}, memory=memory))
        ask(answer_verdict(engine, memory=memory, temperature=0.3))
        ask(answer_verdict(engine, memory=memory, top_p=0.9))
        ask(answer_verdict(engine, memory=memory, max_answer_tokens=9))
        ask(answer_verdict(engine, memory=memory, thinking_end=""))
    assert engine.num_generate_calls == 9
    other = answering("Verdict: unsafe", name="fake:other")
    assert ask(answer_verdict(other, memory=memory)).values == (0.0,)


def labelled(engine: FakeEngine, *, labels: tuple[str, ...] = (" safe", " unsafe")) -> LabelVerdict:
    return LabelVerdict(make_asker(engine), VerdictMemory(10), labels, (1.0, 0.0), adapter="/adapters/safety")


def test_labels_are_graded_and_asked_about_once() -> None:
    """p(safe) = 0.6 / (0.6 + 0.2) = 0.75, whatever the seed."""
    count = CallCount("safety")
    engine = FakeEngine(log_probs=lambda prompt, label: [math.log(0.6 if label == " safe" else 0.2)])
    source = labelled(engine)
    answers = ask(source, num_samples=5, count=count)
    assert answers.mean == pytest.approx(0.75)
    assert (answers.graded, answers.causes) == (True, ())
    assert ask(source, seed=8, count=count) == answers
    assert (count.num_calls, engine.num_score_calls, source.grades, source.num_samples) == (1, 1, True, 1)


@pytest.mark.parametrize(("refuses", "cause"), [(False, "unreadable"), (True, "refused")])
def test_labels_without_a_value_are_missing(refuses: bool, cause: str) -> None:
    def log_probs(prompt: str, label: str) -> list[float]:
        if refuses:
            raise PromptError("too long")
        return [-math.inf]

    count = CallCount("safety")
    answers = ask(labelled(FakeEngine(log_probs=log_probs)), count=count)
    assert (answers.values, answers.causes) == ((), (cause,))
    assert (count.num_calls, count.num_failures) == (1, 1)


def test_labels_of_which_one_begins_another_are_refused() -> None:
    with pytest.raises(SettingsError, match="is the beginning of"):
        labelled(FakeEngine(), labels=(" A", " A-"))
