"""What a criterion is, and the prompted ones: quality (pairwise), safety and factuality (pointwise)."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from services.concurrency import all_of
from services.judge.asking import Answer, Tally, VerdictSource, derived_seed
from services.judge.chunks import JudgedChunk
from services.judge.framing import FramedPrompt
from services.judge.pairing import Pair, all_pairs
from services.judge.rewards import win_rates
from shared.errors import HeadwaterError


class CriterionError(HeadwaterError):
    """A criterion can't score this chunk; `reason` is what the chunk's failure is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Scores:
    """One score in [0, 1] per candidate, and one of the judge's answers where texts were sampled."""

    values: list[float]
    reasoning: str = ""


class Criterion(Protocol):
    """Scores the candidates of one chunk. Raises VerdictError or CriterionError where it can't, EngineError where
    the engine fails; there is no stand-in for a score."""

    async def score(self, chunk: JudgedChunk, *, seed: int, tally: Tally) -> Scores: ...


class Pointwise:
    """Each candidate by itself, mean over the samples. Candidates with the same text share their verdicts."""

    def __init__(self, prompt: FramedPrompt, source: VerdictSource) -> None:
        self._prompt = prompt
        self._source = source

    async def score(self, chunk: JudgedChunk, *, seed: int, tally: Tally) -> Scores:
        texts = _distinct_texts(chunk)
        answers = await all_of(
            self._ask(chunk, text, seed=derived_seed(seed, place), tally=tally) for place, text in enumerate(texts)
        )
        value_of = {text: answer.value for text, answer in zip(texts, answers, strict=True)}
        return Scores([value_of[candidate.text] for candidate in chunk.candidates], _first_reasoning(answers))

    async def _ask(self, chunk: JudgedChunk, text: str, *, seed: int, tally: Tally) -> Answer:
        prompt = self._prompt.fill(chunk, reference=chunk.reference, candidate=text)
        return await self._source.ask(prompt, num_samples=self._source.num_samples, seed=seed, tally=tally)


class Pairwise:
    """Every pair of candidates is compared; a candidate's score is the mean over its comparisons.

    Verdicts are shared out over both orders of a pair, and the orders weigh the same: a judge that always likes the
    first one best makes ties, not preferences. Candidates with the same text tie without being asked about.
    """

    def __init__(self, prompt: FramedPrompt, source: VerdictSource) -> None:
        self._prompt = prompt
        self._source = source

    async def score(self, chunk: JudgedChunk, *, seed: int, tally: Tally) -> Scores:
        texts = _distinct_texts(chunk)
        pairs = all_pairs(len(texts))
        answers = await all_of(
            self._compare(chunk, texts[first], texts[second], seed=derived_seed(seed, first, second), tally=tally)
            for first, second in pairs
        )
        wins = {pair: answer.value for pair, answer in zip(pairs, answers, strict=True)}
        places = [texts.index(candidate.text) for candidate in chunk.candidates]
        outcomes = {
            (first, second): _outcome(wins, places[first], places[second]) for first, second in all_pairs(len(places))
        }
        return Scores(win_rates(len(places), outcomes), _first_reasoning(answers))

    async def _compare(self, chunk: JudgedChunk, first: str, second: str, *, seed: int, tally: Tally) -> Answer:
        """How far `first` beats `second`."""
        num_there, num_back = self._source.samples_per_pair
        if seed % 2:
            num_there, num_back = num_back, num_there
        there = self._prompt.fill(chunk, a=first, b=second)
        back = self._prompt.fill(chunk, a=second, b=first)
        asked = [(there, num_there, "there"), (back, num_back, "back")]
        answers = await all_of(
            self._source.ask(prompt, num_samples=number, seed=derived_seed(seed, order), tally=tally)
            for prompt, number, order in asked
            if number
        )
        orders = [order for _, number, order in asked if number]
        values = [
            answer.value if order == "there" else 1.0 - answer.value
            for answer, order in zip(answers, orders, strict=True)
        ]
        return Answer(fmean(values), _first_reasoning(answers))


def _outcome(wins: dict[Pair, float], first: int, second: int) -> float:
    """From the comparisons of distinct texts, whichever of the two was shown the lower place."""
    if first == second:
        return 0.5
    return wins[first, second] if first < second else 1.0 - wins[second, first]


def _distinct_texts(chunk: JudgedChunk) -> list[str]:
    return list(dict.fromkeys(candidate.text for candidate in chunk.candidates))


def _first_reasoning(answers: Iterable[Answer]) -> str:
    return next((answer.reasoning for answer in answers if answer.reasoning), "")
