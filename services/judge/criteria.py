"""What a criterion is, and the prompted ones: quality (pairwise), safety and factuality (pointwise)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Protocol

from services.concurrency import all_of
from services.engine.base import Engine
from services.judge.verdicts import Answer, Tally, VerdictSource
from services.prompts import Prompt, opened
from shared.api import JudgedText, JudgementItem, JudgementRequest
from shared.errors import HeadwaterError
from shared.records import TokenIds
from shared.seeds import question_seed


@dataclass(frozen=True)
class JudgedChunk:
    window: JudgementRequest
    item: JudgementItem

    @property
    def candidates(self) -> tuple[JudgedText, ...]:
        return self.item.candidates

    @property
    def reference(self) -> str:
        """The original suffix."""
        return self.window.text[self.item.start : self.item.end]

    @property
    def prefix(self) -> str:
        """All of the window before the suffix."""
        return self.window.text[: self.item.start]

    def end_of_prefix(self, max_characters: int) -> str:
        return self.window.text[max(0, self.item.start - max_characters) : self.item.start]

    @property
    def prefix_token_ids(self) -> TokenIds:
        """Of the policy; empty where the request has none."""
        return self.window.token_ids[: self.item.token_start]


class FramedPrompt:
    """A prompt for one engine: plain, or as a user's message in the model's chat template.

    `opens_answer` (label verdicts): under a chat template, a last line of the prompt that ends with a colon, such as
    `Verdict:`, is put at the start of the model's own answer, so that the label comes right after it there too.
    """

    def __init__(
        self, prompt: Prompt, engine: Engine, *, chat: bool, opens_answer: bool, max_prefix_characters: int
    ) -> None:
        message, newline, last_line = prompt.text.rpartition("\n")
        opens_answer = chat and opens_answer and bool(newline) and last_line.endswith(":")
        self._message = Prompt(message + newline) if opens_answer else prompt
        self._opening = Prompt(last_line if opens_answer else "")
        self._engine = engine
        self._chat = chat
        self._max_prefix_characters = max_prefix_characters

    def fill(self, chunk: JudgedChunk, **texts: str) -> str:
        """The end of the chunk's prefix, and the texts unchanged."""
        values = {"prefix": chunk.end_of_prefix(self._max_prefix_characters), **texts}
        message = self._message.fill(values)
        return opened(self._engine.render_chat(message), self._opening.fill(values)) if self._chat else message


Pair = tuple[int, int]
"""Two different places among the candidates, the lower one first."""


def all_pairs(num_candidates: int) -> list[Pair]:
    """All n(n-1)/2 pairs: (0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(range(num_candidates), 2))


def win_rates(num_candidates: int, outcomes: Mapping[Pair, float]) -> list[float]:
    """Per candidate the mean over its comparisons: `outcomes[i, j]` in [0, 1] is how far i beat j, j gets the rest."""
    won: list[list[float]] = [[] for _ in range(num_candidates)]
    for (first, second), outcome in outcomes.items():
        won[first].append(outcome)
        won[second].append(1.0 - outcome)
    return [fmean(results) for results in won]


def scores_within_group(values: Sequence[float], *, scale: float) -> list[float]:
    """sigmoid((value - mean of the group) / scale): 0.5 for the mean, above it for the better ones."""
    mean = fmean(values)
    return [_sigmoid((value - mean) / scale) for value in values]


def combined_rewards(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Weighted mean over the criteria for every candidate."""
    total = math.fsum(weights[name] for name in scores)
    columns = zip(*scores.values(), strict=True)
    shares = [weights[name] / total for name in scores]
    return [
        min(1.0, math.fsum(share * score for share, score in zip(shares, column, strict=True))) for column in columns
    ]


def _sigmoid(x: float) -> float:
    """Without overflow for large negative x."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


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
            self._ask(chunk, text, seed=question_seed(seed, place), tally=tally) for place, text in enumerate(texts)
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
            self._compare(chunk, texts[first], texts[second], seed=question_seed(seed, first, second), tally=tally)
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
            self._source.ask(prompt, num_samples=number, seed=question_seed(seed, order), tally=tally)
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
