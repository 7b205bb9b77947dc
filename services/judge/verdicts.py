"""Gets verdicts from a model: the last `Verdict: X` of sampled answers, or the log-probs of the label words.

    source = AnswerVerdict(engine, settings=CriterionSettings(), verdicts={"safe": 1.0, "unsafe": 0.0}, ...)
    answer = await source.ask("Is this safe? ...", num_samples=5, seed=0, count=CallCount("safety"))
    answer.value    # 0.8: four of five answers end with `Verdict: safe`

An answer without a readable verdict is asked for again. It is never a score.
"""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from services.engine.base import Engine, Sampling
from shared import metrics
from shared.errors import VerdictError
from shared.judge_settings import CriterionSettings
from shared.seeds import question_seed

CHARACTERS_PER_TOKEN = 4
"""Typical of English text; turns `max_answer_tokens` into the length of a structured answer."""


@dataclass
class CallCount:
    """The calls of one criterion on one chunk. One call is one sampled answer or one scored prompt."""

    criterion: str
    num_calls: int = 0
    num_failures: int = 0
    """Calls without a readable verdict."""

    def add_calls(self, number: int) -> None:
        self.num_calls += number
        metrics.judge_calls_total.labels(criterion=self.criterion).inc(number)

    def add_failures(self, number: int) -> None:
        self.num_failures += number
        metrics.judge_failures_total.labels(criterion=self.criterion).inc(number)


@dataclass(frozen=True)
class Answer:
    """The mean verdict on one question, and one of the texts it was read from."""

    value: float
    reasoning: str = ""


@dataclass(frozen=True)
class AnswerVerdict:
    """Samples answers and reads the last `Verdict: X` of each."""

    engine: Engine
    gate: asyncio.Semaphore
    settings: CriterionSettings
    verdicts: Mapping[str, float]
    max_retries: int

    @property
    def num_samples(self) -> int:
        """Verdicts wanted on one candidate."""
        return self.settings.samples

    @property
    def samples_per_pair(self) -> tuple[int, int]:
        """Verdicts wanted on (a, b), and on (b, a)."""
        return self.num_samples - self.num_samples // 2, self.num_samples // 2

    async def ask(self, prompt: str, *, num_samples: int, seed: int, count: CallCount) -> Answer:
        """Raises VerdictError if some verdict is still missing after all retries."""
        values: list[float] = []
        reasoning = ""
        for attempt in range(self.max_retries + 1):
            num_missing = num_samples - len(values)
            texts = await self._sample(prompt, num_missing, seed=question_seed(seed, attempt), count=count)
            read = [(text, read_verdict(text, self.verdicts)) for text in texts]
            values += [value for _, value in read if value is not None]
            reasoning = reasoning or next((text for text, value in read if value is not None), "")
            if len(values) == num_samples:
                return Answer(fmean(values), reasoning)
            count.add_failures(num_samples - len(values))
        raise VerdictError(
            f"{count.criterion}: no readable verdict in {self.max_retries + 1} attempts, "
            f"the last answer ends {texts[-1][-200:]!r}"
        )

    async def _sample(self, prompt: str, num_samples: int, *, seed: int, count: CallCount) -> list[str]:
        max_tokens, pattern = self.settings.max_answer_tokens, ""
        if self.settings.verdict == "structured":
            # Bounded in characters: a bound in tokens would cut answers off before their verdict.
            max_tokens, pattern = answer_pattern(self.verdicts, max_characters=max_tokens * CHARACTERS_PER_TOKEN)
        sampling = Sampling(
            max_tokens=max_tokens,
            num_samples=num_samples,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=seed,
            pattern=pattern,
        )
        async with self.gate:
            count.add_calls(num_samples)
            (generations,) = await self.engine.generate([prompt], sampling)
        return [generation.text for generation in generations]


_ANNOUNCED = re.compile(r"\bverdict\b[^\w\n]*[:=][^\w]*", re.IGNORECASE)


def read_verdict(answer: str, verdicts: Mapping[str, float]) -> float | None:
    """The value of the last `Verdict: X` in `answer`, in any case and markdown; None if it is unclear.

    X must stand alone: `Verdict: A good text ...`, `Verdict: A or B` and an echo of `A|B|tie` are not verdicts.
    """
    announced = list(_ANNOUNCED.finditer(answer))
    if not announced:
        return None
    words = "|".join(re.escape(word) for word in verdicts)
    line = answer[announced[-1].end() :].partition("\n")[0]
    found = re.match(rf"({words})\b(?!\s+\w)", line, re.IGNORECASE)
    if found is None or re.search(rf"\b({words})\b", line[found.end() :]):
        return None
    return {word.lower(): value for word, value in verdicts.items()}[found[1].lower()]


def answer_pattern(verdicts: Mapping[str, float], *, max_characters: int) -> tuple[int, str]:
    """The bound in tokens and the regular expression of a structured answer.

    The answer is up to `max_characters` of anything, then a last line `Verdict: X` that `read_verdict` reads. A
    character has at most four bytes and a token at least one, so the bound never cuts the verdict off.
    """
    words = "|".join(re.escape(word) for word in verdicts)
    max_tokens = 4 * max_characters + len("\nVerdict: ") + max(map(len, verdicts))
    # Not (.|\n): the engine's grammar would take a hundred times as long for each token.
    return max_tokens, rf"([^\x00]{{0,{max_characters}}}\n)?Verdict: ({words})"


@dataclass(frozen=True)
class LabelVerdict:
    """Compares the log-probs of the label words right after the prompt. Nothing is sampled, so seeds don't matter."""

    engine: Engine
    gate: asyncio.Semaphore
    labels: Sequence[str]
    values: Sequence[float]
    num_samples: ClassVar = 1
    samples_per_pair: ClassVar = (1, 1)

    async def ask(self, prompt: str, *, num_samples: int, seed: int, count: CallCount) -> Answer:
        async with self.gate:
            count.add_calls(1)
            log_probs = await self.engine.score(prompt, self.labels)
        value = label_expectation(log_probs, self.values)
        if value is None:
            count.add_failures(1)
            raise VerdictError(f"{count.criterion}: the model gives no probability to any of {list(self.labels)}")
        return Answer(value)


VerdictSource = AnswerVerdict | LabelVerdict


def label_expectation(log_probs: Sequence[Sequence[float]], values: Sequence[float]) -> float | None:
    """Expected value of the labels: sum of p_i * value_i, with p = softmax of each label's summed log-probs.

    `log_probs` holds one list per label, one number per token. None if no label has any probability.
    """
    totals = [math.fsum(row) for row in log_probs]
    highest = max(totals)
    if not math.isfinite(highest) or any(math.isnan(total) for total in totals):
        return None
    odds = [math.exp(total - highest) for total in totals]
    return math.fsum(odd * value for odd, value in zip(odds, values, strict=True)) / math.fsum(odds)
