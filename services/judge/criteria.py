"""What a criterion is, and the two prompted kinds: pairwise (quality, coherence) and pointwise (safety, factuality).

    chunk --> pieces, encoded once, off the event loop --> questions (asker.py) --> answers --> scores in [0, 1]

A pairwise criterion asks about the matches that its schedule names, round by round (schedules.py). A verdict that can't
be read is missing: no mean counts it. A candidate without any readable verdict has no score.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar

from services.concurrency import all_of
from services.frames import Frame, Piece
from services.judge.posterior import Match, Result
from services.judge.schedules import Schedule, make_schedule
from services.judge.tempers import TempersOfChunks
from services.judge.verdicts import Answers, CallCount, Cause, VerdictSource
from services.text_cuts import cut_prefix
from shared import metrics
from shared.api import JudgementItem, JudgementRequest
from shared.errors import HeadwaterError, PromptError
from shared.judge_settings import ScheduleName
from shared.records import Comparison, TokenIds
from shared.seeds import question_seed

T = TypeVar("T")


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
    causes: tuple[Cause, ...] = ()
    """Of the verdicts that are missing for good."""


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
    encoding: Executor
    """One thread for the whole judge: several would only take turns with the event loop."""

    async def off_the_loop(self, encode: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.encoding, encode, *given)

    def encode(self, chunk: JudgedChunk, **texts: str) -> dict[str, Piece]:
        """Prefix and `texts` by placeholder, as far as the prompt has them. Blocking."""
        given = {"prefix": chunk.end_of_prefix(self.max_prefix_characters), **texts}
        return {name: self.frame.piece(name, text) for name, text in given.items() if name in self.frame.placeholders}

    def encode_candidates(self, name: str, chunk: JudgedChunk) -> dict[str, Piece]:
        """The distinct texts for the placeholder `name`, without those that no prompt can show. Blocking."""
        pieces = {}
        for text in chunk.distinct_texts:
            with contextlib.suppress(PromptError):  # too long for any model: that candidate has no score
                pieces[text] = self.frame.piece(name, text)
        return pieces

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
        shared, candidates = await self.prompted.off_the_loop(self._encode, chunk)
        answers = await all_of(
            self.prompted.ask(
                chunk,
                {**shared, "candidate": piece},
                num_samples=self.prompted.source.num_samples,
                seed=question_seed(seed, piece.digest.hex()),  # by what is asked: a request in part asks the same
                count=count,
            )
            for piece in candidates.values()
        )
        value_of = {text: answer.mean for text, answer in zip(candidates, answers, strict=True)}
        values = [value_of.get(text) for text in chunk.texts]
        return Scores(values, _first_reasoning(answers), causes=_causes(answers))

    def _encode(self, chunk: JudgedChunk) -> tuple[dict[str, Piece], dict[str, Piece]]:
        shared = self.prompted.encode(chunk, reference=chunk.reference)
        return shared, self.prompted.encode_candidates("candidate", chunk)


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
    tempers: TempersOfChunks

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        if len(chunk.distinct_texts) == 1:
            return Scores([0.5 if len(chunk.texts) > 1 else None for _ in chunk.texts])
        pairs = await self.prompted.off_the_loop(_Pairs.encoded, self.prompted, chunk, seed, count)
        schedule = self._schedule(pairs)
        results = await self._play(schedule, pairs)
        standing = schedule.standing(results)
        self.tempers.learn(results, num_candidates=len(pairs.texts))
        self._count(results, standing.expected_share)
        score_of = dict(zip(pairs.texts, standing.scores, strict=True))
        values = [score_of.get(text) for text in chunk.texts]
        return Scores(values, pairs.reasoning, self._comparisons(pairs, results), tuple(pairs.causes))

    def _schedule(self, pairs: "_Pairs") -> Schedule:
        source = self.prompted.source
        return make_schedule(
            self.schedule,
            len(pairs.texts),
            graded=source.grades,
            budget=self.budget,
            samples=source.num_samples,
            seed=pairs.seed,
            temper=self.tempers.of(pairs.digest),
        )

    async def _play(self, schedule: Schedule, pairs: "_Pairs") -> list[Result]:
        results: list[Result] = []
        while matches := schedule.next_matches(results):
            results += await pairs.play(matches)
        return results

    def _comparisons(self, pairs: "_Pairs", results: Sequence[Result]) -> tuple[Comparison, ...]:
        places = [pairs.chunk.texts.index(text) for text in pairs.texts]
        return tuple(
            Comparison.model_construct(
                criterion=self.name,
                first=places[result.match.first],
                second=places[result.match.second],
                value=result.value,
            )
            for result in results
        )

    def _count(self, results: Iterable[Result], expected_share: float) -> None:
        for result in results:
            metrics.judge_comparisons_total.labels(self.name, _outcome(result.value)).inc()
        metrics.judge_expected_share.labels(self.name).set(expected_share)


@dataclass
class _Pairs:
    """The questions about one chunk's pairs. Every text is encoded once for each of the two places."""

    prompted: Prompted
    chunk: JudgedChunk
    seed: int
    count: CallCount
    shared: dict[str, Piece]
    firsts: dict[str, Piece]
    seconds: dict[str, Piece]
    reasoning: str = ""
    causes: list[Cause] = field(default_factory=list)
    _num_asked: dict[Match, int] = field(default_factory=dict)

    @classmethod
    def encoded(cls, prompted: Prompted, chunk: JudgedChunk, seed: int, count: CallCount) -> "_Pairs":
        """Blocking."""
        firsts, seconds = prompted.encode_candidates("a", chunk), prompted.encode_candidates("b", chunk)
        return cls(prompted, chunk, seed, count, prompted.encode(chunk), firsts, seconds)

    @property
    def texts(self) -> list[str]:
        """That take part."""
        return list(self.firsts)

    @property
    def digest(self) -> int:
        """The same for a chunk that is asked about again."""
        return question_seed(self.seed, *(piece.digest.hex() for piece in self.firsts.values()))

    async def play(self, matches: Sequence[Match]) -> list[Result]:
        answers = await all_of([self._ask(match) for match in matches])
        self.reasoning = self.reasoning or _first_reasoning(answers)
        self.causes += _causes(answers)
        return [Result(match, answer.mean) for match, answer in zip(matches, answers, strict=True)]

    def _ask(self, match: Match) -> Coroutine[Any, Any, Answers]:
        """The same match again asks at another seed."""
        number = self._num_asked[match] = self._num_asked.get(match, 0) + 1
        texts = self.texts
        first, second = self.firsts[texts[match.first]], self.seconds[texts[match.second]]
        return self.prompted.ask(
            self.chunk,
            {**self.shared, "a": first, "b": second},
            num_samples=1,
            seed=question_seed(self.seed, first.digest.hex(), second.digest.hex(), number),
            count=self.count,
        )


def _outcome(value: float | None) -> str:
    """Of the text that was shown first."""
    if value is None:
        return "missing"
    return "tie" if value == 0.5 else "first" if value > 0.5 else "second"


def _causes(answers: Iterable[Answers]) -> tuple[Cause, ...]:
    return tuple(cause for answer in answers for cause in answer.causes)


def _first_reasoning(answers: Iterable[Answers]) -> str:
    return next((answer.reasoning for answer in answers if answer.reasoning), "")
