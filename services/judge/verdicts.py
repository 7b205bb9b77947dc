"""Reads a judge's verdicts: the last `Verdict: X` of a sampled answer, or the scores of the label words. Pure.

An answer without a readable verdict gives None here and is asked for again by the caller: it is never a score.
"""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from services.engine.base import Engine, Generation, Sampling
from shared import metrics
from shared.errors import VerdictError
from shared.seeds import question_seed
from shared.settings import CriterionSettings

CHARACTERS_PER_TOKEN = 4
"""About what English text has; turns `max_answer_tokens` into the length of a structured answer."""


@dataclass
class Tally:
    """Counts the calls of one criterion on one chunk while they are made. A call is one sampled answer or one
    scored prompt."""

    criterion: str
    num_calls: int = 0
    num_failures: int = 0

    def count_calls(self, number: int) -> None:
        self.num_calls += number
        metrics.judge_calls_total.labels(criterion=self.criterion).inc(number)

    def count_failures(self, number: int) -> None:
        self.num_failures += number
        metrics.judge_failures_total.labels(criterion=self.criterion).inc(number)


@dataclass(frozen=True)
class Answer:
    """Mean verdict on one question, and one of the texts that it was read from."""

    value: float
    reasoning: str = ""


class VerdictSource(Protocol):
    """Where verdicts come from."""

    @property
    def samples_per_pair(self) -> tuple[int, int]:
        """How many verdicts on (a, b) and how many on (b, a)."""
        ...

    @property
    def num_samples(self) -> int:
        """How many verdicts on one candidate."""
        ...

    async def ask(self, prompt: str, *, num_samples: int, seed: int, tally: Tally) -> Answer:
        """Raises VerdictError where the model gives no verdict after all retries."""
        ...


class AnswerVerdict:
    """Samples answers and reads the last `Verdict: X` of each. Unreadable ones are asked for again.

    With `verdict = "structured"` the engine holds each answer to a form that ends in one, its length counted in
    characters: a limit in tokens would cut answers off before their verdict.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        settings: CriterionSettings,
        verdicts: Mapping[str, float],
        max_retries: int,
        gate: asyncio.Semaphore,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._verdicts = verdicts
        self._max_retries = max_retries
        self._gate = gate
        self._max_tokens, self._pattern = settings.max_answer_tokens, ""
        if settings.verdict == "structured":
            max_characters = settings.max_answer_tokens * CHARACTERS_PER_TOKEN
            self._max_tokens, self._pattern = answer_pattern(verdicts, max_characters=max_characters)

    @property
    def num_samples(self) -> int:
        return self._settings.samples

    @property
    def samples_per_pair(self) -> tuple[int, int]:
        return self.num_samples - self.num_samples // 2, self.num_samples // 2

    async def ask(self, prompt: str, *, num_samples: int, seed: int, tally: Tally) -> Answer:
        values: list[float] = []
        reasoning = ""
        for attempt in range(self._max_retries + 1):
            asked = num_samples - len(values)
            texts = await self._sample(prompt, asked, question_seed(seed, attempt), tally)
            read = [(text, read_verdict(text, self._verdicts)) for text in texts]
            values += [value for _, value in read if value is not None]
            reasoning = reasoning or next((text for text, value in read if value is not None), "")
            if len(values) == num_samples:
                return Answer(fmean(values), reasoning)
            tally.count_failures(num_samples - len(values))
        raise VerdictError(
            f"{tally.criterion}: no readable verdict in {self._max_retries + 1} attempts, "
            f"the last answer ends {texts[-1][-200:]!r}"
        )

    async def _sample(self, prompt: str, num_samples: int, seed: int, tally: Tally) -> list[str]:
        sampling = Sampling(
            max_tokens=self._max_tokens,
            num_samples=num_samples,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=seed,
            pattern=self._pattern,
        )
        async with self._gate:
            tally.count_calls(num_samples)
            generations: list[Generation] = (await self._engine.generate([prompt], sampling))[0]
        return [generation.text for generation in generations]


class LabelVerdict:
    """Compares the log-probs of the verdict words right after the prompt; samples and seeds change nothing."""

    num_samples = 1
    samples_per_pair = (1, 1)

    def __init__(
        self, engine: Engine, *, labels: Sequence[str], values: Sequence[float], gate: asyncio.Semaphore
    ) -> None:
        self._engine = engine
        self._labels = labels
        self._values = values
        self._gate = gate

    async def ask(self, prompt: str, *, num_samples: int, seed: int, tally: Tally) -> Answer:
        async with self._gate:
            tally.count_calls(1)
            log_probs = await self._engine.score(prompt, self._labels)
        value = label_expectation(log_probs, self._values)
        if value is None:
            tally.count_failures(1)
            raise VerdictError(f"{tally.criterion}: the model gives no label of {list(self._labels)} any probability")
        return Answer(value)


QUALITY_VERDICTS: Mapping[str, float] = {"A": 1.0, "B": 0.0, "tie": 0.5}
"""What the continuation shown as A gets."""
SAFETY_VERDICTS: Mapping[str, float] = {"safe": 1.0, "unsafe": 0.0}
FACTUALITY_VERDICTS: Mapping[str, float] = {"none": 1.0, "possible": 0.5, "definite": 0.0}
"""By kind of hallucination."""

QUALITY_LABELS = (" A", " B")
SAFETY_LABELS = (" safe", " unsafe")
FACTUALITY_LABELS = (" none", " possible", " definite")

_ANNOUNCED = re.compile(r"\bverdict\b[^\w\n]*[:=][^\w]*", re.IGNORECASE)


def read_verdict(answer: str, verdicts: Mapping[str, float]) -> float | None:
    """The value of the last `Verdict: X` in `answer`, in any case and markdown; None where it can't be told.

    X must stand alone: `Verdict: A good text ...`, `Verdict: A or B` and an echo of `A|B|tie` are no verdicts.
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
    """Bound in tokens, and a regular expression for structured answers: up to `max_characters` of anything, then a
    line `Verdict: X` as the end. X is one of `verdicts`, and `read_verdict` reads it.

    A character has four bytes at most and a token one at least, so the bound cuts no answer off before its verdict.
    """
    words = "|".join(re.escape(word) for word in verdicts)
    max_tokens = 4 * max_characters + len("\nVerdict: ") + max(map(len, verdicts))
    # Not (.|\n): the engine's grammar takes a hundred times as long for each token then.
    return max_tokens, rf"([^\x00]{{0,{max_characters}}}\n)?Verdict: ({words})"


def label_expectation(log_probs: Sequence[Sequence[float]], values: Sequence[float]) -> float | None:
    """Expected value of the labels: sum of p_i * value_i, with p = softmax of each label's summed log-probs.

    `log_probs` holds one list per label, one number per token. None where no label has any probability.
    """
    totals = [math.fsum(row) for row in log_probs]
    highest = max(totals)
    if not math.isfinite(highest) or any(math.isnan(total) for total in totals):
        return None
    odds = [math.exp(total - highest) for total in totals]
    return math.fsum(odd * value for odd, value in zip(odds, values, strict=True)) / math.fsum(odds)
