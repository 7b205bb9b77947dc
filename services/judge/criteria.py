"""What a criterion is, and the two prompted kinds: pairwise (quality) and pointwise (safety, factuality)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Protocol

from services.concurrency import all_of
from services.engine.base import Engine
from services.judge.verdicts import Answer, CallCount, VerdictSource
from services.prompts import Prompt, opened
from shared.api import JudgementItem, JudgementRequest
from shared.errors import HeadwaterError
from shared.records import TokenIds
from shared.seeds import question_seed


@dataclass(frozen=True)
class JudgedChunk:
    window: JudgementRequest
    item: JudgementItem

    @property
    def texts(self) -> list[str]:
        """Of the candidates."""
        return [candidate.text for candidate in self.item.candidates]

    @property
    def distinct_texts(self) -> list[str]:
        """In the order in which they come first."""
        return list(dict.fromkeys(self.texts))

    @property
    def reference(self) -> str:
        """The original suffix."""
        return self.window.text[self.item.start : self.item.end]

    def end_of_prefix(self, max_characters: int) -> str:
        return self.window.text[max(0, self.item.start - max_characters) : self.item.start]

    @property
    def prefix_token_ids(self) -> TokenIds:
        """The policy's; empty if the request has none."""
        return self.window.token_ids[: self.item.token_start]


@dataclass(frozen=True)
class Scores:
    """One score in [0, 1] per candidate. `reasoning` is one of the sampled answers, if any were sampled."""

    values: list[float | None]
    """None: this candidate can't be scored."""
    reasoning: str = ""


class CriterionError(HeadwaterError):
    """A criterion can't score this chunk. The chunk's failure is counted under `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Criterion(Protocol):
    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        """VerdictError or CriterionError if some candidate can't be scored, EngineError if the engine fails."""
        ...


@dataclass(frozen=True)
class FramedPrompt:
    """A prompt for one engine: plain, or as a user message in the model's chat template."""

    prompt: Prompt
    engine: Engine
    chat: bool
    opens_answer: bool
    """For label verdicts in a chat: a last line that ends with a colon, such as `Verdict:`, becomes the start of the
    model's answer, so that the label follows it directly."""
    max_prefix_characters: int

    def fill(self, chunk: JudgedChunk, **texts: str) -> str:
        """With the end of the chunk's prefix, and with `texts` unchanged."""
        values = {"prefix": chunk.end_of_prefix(self.max_prefix_characters), **texts}
        if not self.chat:
            return self.prompt.fill(values)
        message, newline, opening = self.prompt.text.rpartition("\n")
        if not (self.opens_answer and newline and opening.endswith(":")):
            return self.engine.render_chat(self.prompt.fill(values))
        return opened(self.engine.render_chat(Prompt(message + newline).fill(values)), Prompt(opening).fill(values))


@dataclass(frozen=True)
class Pointwise:
    """Asks about each candidate alone; the score is the mean verdict. Equal texts are asked about once."""

    prompt: FramedPrompt
    source: VerdictSource

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        texts = chunk.distinct_texts
        answers = await all_of(
            self.source.ask(
                self.prompt.fill(chunk, reference=chunk.reference, candidate=text),
                num_samples=self.source.num_samples,
                seed=question_seed(seed, place),
                count=count,
            )
            for place, text in enumerate(texts)
        )
        value_of = {text: answer.value for text, answer in zip(texts, answers, strict=True)}
        return Scores([value_of[text] for text in chunk.texts], _first_reasoning(answers))


@dataclass(frozen=True)
class Pairwise:
    """Compares every pair of candidates; the score is the mean over a candidate's comparisons.

    A pair's verdicts are split over both orders, which weigh the same: a judge that always prefers the first text
    makes ties, not preferences. Equal texts tie without being asked about.
    """

    prompt: FramedPrompt
    source: VerdictSource

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        pairs = list(combinations(enumerate(chunk.distinct_texts), 2))
        answers = await all_of(
            self._compare(chunk, first, second, seed=question_seed(seed, place, other), count=count)
            for (place, first), (other, second) in pairs
        )
        wins: dict[tuple[str, str], float] = {}
        for ((_, first), (_, second)), answer in zip(pairs, answers, strict=True):
            wins[first, second], wins[second, first] = answer.value, 1.0 - answer.value
        return Scores([*win_rates(chunk.texts, wins)], _first_reasoning(answers))

    async def _compare(self, chunk: JudgedChunk, first: str, second: str, *, seed: int, count: CallCount) -> Answer:
        """How far `first` beats `second`."""
        num_there, num_back = self.source.samples_per_pair
        if seed % 2:
            num_there, num_back = num_back, num_there
        orders = [("there", first, second, num_there), ("back", second, first, num_back)]
        asked = [order for order in orders if order[-1]]
        answers = await all_of(
            self.source.ask(
                self.prompt.fill(chunk, a=a, b=b), num_samples=number, seed=question_seed(seed, order), count=count
            )
            for order, a, b, number in asked
        )
        values = [
            answer.value if order == "there" else 1.0 - answer.value
            for (order, *_), answer in zip(asked, answers, strict=True)
        ]
        return Answer(fmean(values), _first_reasoning(answers))


def win_rates(texts: Sequence[str], wins: Mapping[tuple[str, str], float]) -> list[float]:
    """Per text the mean over its comparisons with all the others; equal texts tie.

    `wins[x, y]` in [0, 1] is how far x beats y:
    win_rates(["x", "y", "y"], {("x", "y"): 1.0, ("y", "x"): 0.0}) == [1.0, 0.25, 0.25]
    """
    return [
        fmean(wins.get((text, other), 0.5) for rival, other in enumerate(texts) if rival != place)
        for place, text in enumerate(texts)
    ]


def _first_reasoning(answers: Iterable[Answer]) -> str:
    return next((answer.reasoning for answer in answers if answer.reasoning), "")
