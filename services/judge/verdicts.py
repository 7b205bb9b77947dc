"""Gets verdicts from a model: the last `Verdict: X` of sampled answers, or the log-probs of the label words.

    source = AnswerVerdict(asker, memory, CriterionSettings(), {"safe": 1.0, "unsafe": 0.0}, 3, thinking_end="</think>")
    answers = await source.ask(prompt, num_samples=5, seed=0, count=CallCount("safety"), turn=0)
    answers.values    # (1.0, 1.0, 0.0, 1.0): the fifth is missing, and answers.causes == ("truncated",)

What can't be read is asked for again at another seed and temperature. It is never a score: a verdict that stays unread
is missing, with its cause.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Literal, Protocol

from services.engine.base import Generation, Sampling
from services.judge.asker import Asker, FramedPrompt
from services.judge.reading import (
    CHARACTERS_PER_TOKEN,
    answer_pattern,
    check_labels,
    end_of_thoughts,
    find_verdict,
    gradable_words,
    graded_value,
    is_whole,
    label_expectation,
)
from services.judge.verdict_memory import VerdictMemory
from shared import metrics
from shared.errors import PromptError, RequestError
from shared.judge_settings import CriterionSettings
from shared.seeds import question_seed

Cause = Literal["unreadable", "truncated", "refused"]
"""`truncated`: the answer was cut off before it ended. `refused`: the engine won't answer this prompt (its content
filter, or too long)."""

RETRY_TEMPERATURES = (0.5, 0.8, 0.65, 0.95)
"""Of the first, second, ... retry, without the one that was asked at first. At 0 the same answer would come again; far
above 1 answers ramble."""


@dataclass
class CallCount:
    """The calls of one criterion on one chunk. One call is one sampled answer or one scored prompt."""

    criterion: str
    num_calls: int = 0
    num_failures: int = 0
    """Calls without a verdict."""

    def add_calls(self, number: int) -> None:
        self.num_calls += number
        metrics.judge_calls_total.labels(criterion=self.criterion).inc(number)

    def add_failures(self, causes: Sequence[Cause]) -> None:
        self.num_failures += len(causes)
        for cause in causes:
            metrics.judge_failures_total.labels(criterion=self.criterion, cause=cause).inc()


@dataclass(frozen=True, slots=True)
class Answers:
    """The verdicts on one question, or of one engine call."""

    values: tuple[float, ...]
    """In [0, 1]; fewer than asked for where some are missing."""
    graded: bool
    """The values are expectations over the probabilities of all verdict words, not the words that were sampled."""
    reasoning: str = ""
    """The first text that a verdict was read from."""
    causes: tuple[Cause, ...] = ()
    """Why each missing verdict is missing."""

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None


class VerdictSource(Protocol):
    @property
    def num_samples(self) -> int:
        """Verdicts that are wanted on one candidate, or on one pair over both orders."""

    @property
    def grades(self) -> bool:
        """Whether values are probabilities rather than sampled words."""

    async def ask(self, prompt: FramedPrompt, *, num_samples: int, seed: int, count: CallCount, turn: int) -> Answers:
        """EngineError if the engine fails for longer than the asker's patience."""


@dataclass(frozen=True)
class AnswerVerdict:
    """Samples answers and reads the last `Verdict: X` of each."""

    asker: Asker
    memory: VerdictMemory
    settings: CriterionSettings
    verdicts: Mapping[str, float]
    max_retries: int
    _: KW_ONLY
    thinking_end: str

    @property
    def num_samples(self) -> int:
        return self.settings.samples

    @property
    def grades(self) -> bool:
        return bool(self._words)

    async def ask(self, prompt: FramedPrompt, *, num_samples: int, seed: int, count: CallCount, turn: int) -> Answers:
        """Each call is remembered by itself: of 3 good samples in 5, only 2 are asked for again, even later."""
        found = Answers((), graded=self.grades)
        num_retries = num_calls = 0
        while True:
            num_missing = num_samples - len(found.values)
            sampling = self._sampling(num_missing, question_seed(seed, num_calls), num_retries)
            answers = await self._remembered(prompt, sampling, count=count, turn=turn)
            found = _joined(found, answers)
            num_calls += 1
            # An engine may give fewer samples than it was asked for: that alone is no failure.
            num_retries += bool(answers.causes)
            if len(found.values) == num_samples:
                return replace(found, causes=())
            if "refused" in answers.causes or num_retries > self.max_retries:
                return replace(found, causes=answers.causes[-1:] * (num_samples - len(found.values)))

    async def _remembered(self, prompt: FramedPrompt, sampling: Sampling, *, count: CallCount, turn: int) -> Answers:
        asked = f"{sampling.seed} {sampling.num_samples} {sampling.temperature}".encode()
        key = _digest(self._identity, prompt.key, asked)
        return await self.memory.recall(key, lambda: self._sample(prompt, sampling, count=count, turn=turn))

    async def _sample(self, prompt: FramedPrompt, sampling: Sampling, *, count: CallCount, turn: int) -> Answers:
        try:
            generations = await self.asker.generate(prompt, sampling, turn=turn)
        except (PromptError, RequestError):
            refused: Cause = "refused"
            answers = Answers((), graded=self.grades, causes=(refused,) * sampling.num_samples)
        else:
            answers = self._read_all(generations[: sampling.num_samples], sampling.pattern)
        count.add_calls(len(answers.values) + len(answers.causes))
        count.add_failures(answers.causes)
        return answers

    def _sampling(self, num_samples: int, seed: int, retry: int) -> Sampling:
        max_tokens, pattern = self._form
        return Sampling(
            max_tokens=max_tokens,
            num_samples=num_samples,
            temperature=retry_temperature(self.settings.temperature, retry),
            top_p=self.settings.top_p,
            seed=seed,
            pattern=pattern,
            words=tuple(self._words),
            adapter=self.settings.lora_adapter,
        )

    def _read_all(self, generations: Sequence[Generation], pattern: str) -> Answers:
        found = Answers((), graded=self.grades)
        for generation in generations:
            found = _joined(found, self._read(generation, pattern))
        return found

    def _read(self, generation: Generation, pattern: str) -> Answers:
        text, is_cut = generation.text, generation.finish_reason == "length"
        if is_cut and not (pattern and is_whole(text, pattern, self.verdicts)):
            return Answers((), graded=self.grades, causes=("truncated",))
        begin = end_of_thoughts(text, self.thinking_end)
        written = None if begin is None else find_verdict(text, self.verdicts, begin=begin)
        if written is None:
            return Answers((), graded=self.grades, causes=("unreadable",))
        graded = graded_value(generation.word_odds, written.start, list(self._words.values()))
        value = self.verdicts[written.word] if graded is None else graded
        return Answers((value,), graded=graded is not None, reasoning=text)

    @cached_property
    def _words(self) -> Mapping[str, float]:
        """Whose odds are asked for, with their values; empty if verdicts are not graded."""
        engine = self.asker.engine
        return gradable_words(self.verdicts, engine) if self.settings.graded and engine.can_grade else {}

    @cached_property
    def _form(self) -> tuple[int, str]:
        """The bound in tokens, and the pattern of a structured answer."""
        max_tokens = self.settings.max_answer_tokens
        if self.settings.verdict != "structured":
            return max_tokens, ""
        # Bounded in characters: a bound in tokens would cut answers off before their verdict.
        return answer_pattern(self.verdicts, max_characters=max_tokens * CHARACTERS_PER_TOKEN)

    @cached_property
    def _identity(self) -> bytes:
        """All that decides an answer but the prompt, the seed, the temperature and the number of samples."""
        settings = self.settings
        asked = ("answer", self._form, settings.top_p, settings.lora_adapter, tuple(self._words))
        read = (tuple(self.verdicts.items()), self.thinking_end)
        return _digest(repr((self.asker.engine.name, asked, read)).encode())


def retry_temperature(temperature: float, retry: int) -> float:
    """`retry` 0 is the first attempt. retry_temperature(0.5, 1) == 0.8: never the same again."""
    if not retry:
        return temperature
    others = [other for other in RETRY_TEMPERATURES if other != temperature]
    return others[(retry - 1) % len(others)]


@dataclass(frozen=True)
class LabelVerdict:
    """Compares the log-probs of the label words right after the prompt. Nothing is sampled, so seeds don't matter."""

    asker: Asker
    memory: VerdictMemory
    labels: Sequence[str]
    """Verdict words exactly as they follow the prompt, with their space."""
    values: Sequence[float]
    _: KW_ONLY
    adapter: str = ""

    def __post_init__(self) -> None:
        check_labels(self.labels)

    @property
    def num_samples(self) -> int:
        return 1

    @property
    def grades(self) -> bool:
        return True

    async def ask(self, prompt: FramedPrompt, *, num_samples: int, seed: int, count: CallCount, turn: int) -> Answers:
        """One value, however many samples are asked for."""
        key = _digest(self._identity, prompt.key)
        return await self.memory.recall(key, lambda: self._score(prompt, count=count, turn=turn))

    async def _score(self, prompt: FramedPrompt, *, count: CallCount, turn: int) -> Answers:
        value: float | None = None
        cause: Cause = "unreadable"  # the model gives no probability to any of them
        try:
            log_probs = await self.asker.score(prompt, self.labels, turn=turn, adapter=self.adapter)
            value = label_expectation(log_probs, self.values)
        except (PromptError, RequestError):
            cause = "refused"
        answers = Answers((), graded=True, causes=(cause,)) if value is None else Answers((value,), graded=True)
        count.add_calls(1)
        count.add_failures(answers.causes)
        return answers

    @cached_property
    def _identity(self) -> bytes:
        """All that decides a value but the prompt."""
        asked = ("labels", self.asker.engine.name, tuple(self.labels), tuple(self.values), self.adapter)
        return _digest(repr(asked).encode())


def _joined(first: Answers, second: Answers) -> Answers:
    return Answers(
        first.values + second.values,
        graded=first.graded and second.graded,
        reasoning=first.reasoning or second.reasoning,
        causes=first.causes + second.causes,
    )


def _digest(*pieces: bytes) -> bytes:
    """16 bytes. All pieces but the last have a fixed length, so that their borders are clear."""
    return hashlib.blake2b(b"".join(pieces), digest_size=16).digest()
