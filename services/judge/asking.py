"""Puts one question to the judge's model and returns a value in [0, 1]: by sampled answers or by label scores.

    criterion --ask(prompt, num_samples, seed)--> AnswerVerdict | LabelVerdict --> Engine

All criteria share one `gate` (a semaphore as wide as the engine's queue): a question waits here when the engine has
enough to do, so that the judge never overruns its own engine; each answer lets the next question through.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from services.engine.base import Engine, Generation, Sampling
from services.judge.verdicts import answer_pattern, label_expectation, read_verdict
from shared import metrics
from shared.errors import VerdictError
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
            texts = await self._sample(prompt, asked, derived_seed(seed, attempt), tally)
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


def derived_seed(seed: int, *place: int | str) -> int:
    """31 bits that depend on the request's seed and the place of a question in it, on nothing else."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
