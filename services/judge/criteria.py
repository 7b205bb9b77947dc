"""What a criterion is, and the two prompted kinds: pairwise (quality, coherence) and pointwise (safety, factuality).

    chunk --> pieces, encoded once, off the event loop --> questions (asker.py) --> answers --> scores in [0, 1]

A pairwise criterion asks about the matches that its schedule names, round by round (schedules.py). A verdict that can't
be read is missing: no mean counts it. A candidate without any readable verdict has no score.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from services.concurrency import all_of
from services.frames import Frame, Piece, cut_prefix
from services.judge.schedules import Match, Result, Schedule, Tempers, make_schedule
from services.judge.verdicts import Answers, CallCount, VerdictSource
from shared import metrics
from shared.api import JudgementItem, JudgementRequest
from shared.errors import HeadwaterError
from shared.judge_settings import ScheduleName
from shared.records import Comparison, TokenIds
from shared.seeds import question_seed


@dataclass(frozen=True)
class JudgedChunk:
    window: JudgementRequest
    item: JudgementItem
    turn: int
    """Order of arrival of the request: older questions go first."""
    nonce: str
    """The word in the tags of the window's prompts (frames.py)."""

    @cached_property
    def texts(self) -> list[str]:
        """Of the candidates."""
        return [candidate.text for candidate in self.item.candidates]

    @cached_property
    def distinct_texts(self) -> list[str]:
        """In the order in which they come first."""
        return list(dict.fromkeys(self.texts))

    @property
    def reference(self) -> str:
        """The original suffix."""
        return self.window.text[self.item.start : self.item.end]

    def end_of_prefix(self, max_characters: int) -> str:
        return cut_prefix(self.window.text, self.item.start, max_characters)

    @property
    def prefix_token_ids(self) -> TokenIds:
        """The policy's; empty if the request has none."""
        return self.window.token_ids[: self.item.token_start]


@dataclass(frozen=True)
class Scores:
    """One score in [0, 1] per candidate; None for one that could not be scored."""

    values: list[float | None]
    reasoning: str = ""
    """One of the sampled answers, if any were sampled."""
    comparisons: tuple[Comparison, ...] = ()


class CriterionError(HeadwaterError):
    """A criterion can't score this chunk. The chunk's failure is counted under `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Criterion(Protocol):
    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        """CriterionError if the chunk as a whole can't be scored, EngineError if the engine fails."""
        ...


@dataclass(frozen=True)
class Prompted:
    """How a criterion puts its question."""

    frame: Frame
    source: VerdictSource
    max_prefix_characters: int

    def encode(self, chunk: JudgedChunk, **texts: str) -> dict[str, Piece]:
        """Prefix and `texts` by placeholder. Blocking."""
        given = {"prefix": chunk.end_of_prefix(self.max_prefix_characters), **texts}
        return {name: self.frame.piece(name, text) for name, text in given.items() if name in self.frame.placeholders}

    async def ask(
        self, chunk: JudgedChunk, pieces: Mapping[str, Piece], *, num_samples: int, seed: int, count: CallCount
    ) -> Answers:
        prompt = self.frame.join(pieces, nonce=chunk.nonce)
        return await self.source.ask(prompt, num_samples=num_samples, seed=seed, count=count, turn=chunk.turn)


@dataclass(frozen=True)
class Pointwise:
    """Asks about each candidate alone; the score is the mean verdict. Equal texts are asked about once."""

    prompted: Prompted

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        texts = chunk.distinct_texts
        shared, candidates = await asyncio.to_thread(self._encode, chunk, texts)
        answers = await all_of(
            self.prompted.ask(
                chunk,
                {**shared, "candidate": piece},
                num_samples=self.prompted.source.num_samples,
                seed=question_seed(seed, piece.digest.hex()),  # by what is asked: a request in part asks the same
                count=count,
            )
            for piece in candidates
        )
        value_of = {text: answer.mean for text, answer in zip(texts, answers, strict=True)}
        return Scores([value_of[text] for text in chunk.texts], _first_reasoning(answers))

    def _encode(self, chunk: JudgedChunk, texts: Sequence[str]) -> tuple[dict[str, Piece], list[Piece]]:
        shared = self.prompted.encode(chunk, reference=chunk.reference)
        return shared, [self.prompted.frame.piece("candidate", text) for text in texts]


@dataclass(frozen=True)
class Pairwise:
    """Compares pairs of candidates as the schedule says; a score is the mean of its wins over all others.

    Both orders weigh the same or their bias is fitted: a judge that always prefers the first text makes ties. Equal
    texts tie without being asked about.
    """

    name: str
    prompted: Prompted
    schedule: ScheduleName
    budget: int
    tempers: Tempers = field(default_factory=Tempers)

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        texts = chunk.distinct_texts
        if len(texts) == 1:
            return Scores([0.5 if len(chunk.texts) > 1 else None for _ in chunk.texts])
        questions = await asyncio.to_thread(_Pairs.encoded, self.prompted, chunk, seed, count)
        schedule = make_schedule(
            self.schedule,
            len(texts),
            graded=self.prompted.source.grades,
            budget=self.budget,
            samples=self.prompted.source.num_samples,
            seed=seed,
            temper=self.tempers.of(questions.digest),
        )
        results = await self._play(schedule, questions)
        standing = schedule.standing(results)
        self.tempers.learn(schedule, results)
        self._count(results, standing.expected_share)
        score_of = dict(zip(texts, standing.scores, strict=True))
        comparisons = self._comparisons(chunk, texts, results)
        return Scores([score_of[text] for text in chunk.texts], questions.reasoning, comparisons)

    async def _play(self, schedule: Schedule, questions: "_Pairs") -> list[Result]:
        results: list[Result] = []
        while matches := schedule.next_matches(results):
            results += await questions.play(matches)
        return results

    def _comparisons(
        self, chunk: JudgedChunk, texts: Sequence[str], results: Sequence[Result]
    ) -> tuple[Comparison, ...]:
        places = [chunk.texts.index(text) for text in texts]
        return tuple(
            Comparison.model_construct(
                criterion=self.name,
                first=places[result.match.first],
                second=places[result.match.second],
                value=result.value,
            )
            for result in results
        )

    def _count(self, results: Iterable[Result], expected_share: float | None) -> None:
        for result in results:
            metrics.judge_comparisons_total.labels(self.name, _outcome(result.value)).inc()
        if expected_share is not None:
            metrics.judge_expected_share.labels(self.name).set(expected_share)


@dataclass
class _Pairs:
    """The questions about one chunk's pairs. Every text is encoded once."""

    prompted: Prompted
    chunk: JudgedChunk
    shared: dict[str, Piece]
    firsts: list[Piece]
    """Each text as the one shown first, then as the one shown second."""
    seconds: list[Piece]
    seed: int
    count: CallCount
    reasoning: str = ""
    _asked: dict[Match, int] = field(default_factory=dict)

    @classmethod
    def encoded(cls, prompted: Prompted, chunk: JudgedChunk, seed: int, count: CallCount) -> "_Pairs":
        """Blocking."""
        firsts = [prompted.frame.piece("a", text) for text in chunk.distinct_texts]
        seconds = [prompted.frame.piece("b", text) for text in chunk.distinct_texts]
        return cls(prompted, chunk, prompted.encode(chunk), firsts, seconds, seed, count)

    @property
    def digest(self) -> tuple[int, str]:
        """The same for a request that is asked again."""
        return question_seed(self.seed, *(piece.digest.hex() for piece in self.firsts)), self.chunk.nonce

    async def play(self, matches: Sequence[Match]) -> list[Result]:
        answers = await all_of([self._ask(match) for match in matches])
        self.reasoning = self.reasoning or _first_reasoning(answers)
        return [Result(match, answer.mean) for match, answer in zip(matches, answers, strict=True)]

    async def _ask(self, match: Match) -> Answers:
        """The same match again asks at another seed."""
        number = self._asked[match] = self._asked.get(match, 0) + 1
        first, second = self.firsts[match.first], self.seconds[match.second]
        seed = question_seed(self.seed, first.digest.hex(), second.digest.hex(), number)
        pieces = {**self.shared, "a": first, "b": second}
        return await self.prompted.ask(self.chunk, pieces, num_samples=1, seed=seed, count=self.count)


def _outcome(value: float | None) -> str:
    """Of the text that was shown first."""
    if value is None:
        return "missing"
    return "tie" if value == 0.5 else "first" if value > 0.5 else "second"


def _first_reasoning(answers: Iterable[Answers]) -> str:
    return next((answer.reasoning for answer in answers if answer.reasoning), "")
