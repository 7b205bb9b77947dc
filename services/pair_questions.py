"""One question to a judge whose answer is known: two texts after one prefix, of which one is better.

    question = PairQuestion(text, start=120, end=160, better=text[120:160], worse=pair.spoiled, better_first=True)
    answer = await judge.judge(lambda with_token_ids: question.request(encode, seed=7))
    question.preference(answer.judgements[0])       # 1.0: the judge gave the better text the higher reward

The request is an ordinary one about an ordinary pair of candidates: a judge can't tell it from the run's own. The judge
decides by itself which text it shows first, how often; its comparisons tell (`shown`). Used by the collector's probes
and by `headwater judge-audit`.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.api import JudgedText, JudgementFailure, JudgementItem, JudgementRequest
from shared.records import Judgement

Encode = Callable[[str], Sequence[int]]
"""Text to the policy's token ids, without BOS."""


@dataclass(frozen=True)
class Showing:
    """One verdict of a pairwise criterion."""

    better_first: bool
    """Whether the better text was shown as A."""
    value: float | None
    """For the better text, in [0, 1]; None: unreadable."""


@dataclass(frozen=True)
class PairQuestion:
    text: str
    """Of the window; the prefix is `text[:start]`, the original suffix `text[start:end]`."""
    start: int
    end: int
    better: str
    worse: str
    better_first: bool
    """Of the two candidates; which of them is shown first is the judge's choice."""

    @property
    def candidates(self) -> tuple[str, str]:
        return (self.better, self.worse) if self.better_first else (self.worse, self.better)

    def request(
        self, encode: Encode | None = None, *, opening: Sequence[int] = (), seed: int, criteria: Sequence[str] = ()
    ) -> JudgementRequest:
        """With `encode` also in token ids, for judges that want them; `opening` is the BOS of every window."""
        span, about = {"start": self.start, "end": self.end}, dict[str, Any](seed=seed)
        if criteria:
            about["criteria"] = tuple(criteria)
        if encode is None:
            texts = tuple(JudgedText(text=text) for text in self.candidates)
            return JudgementRequest(text=self.text, items=(JudgementItem(candidates=texts, **span),), **about)
        prefix, suffix = (*opening, *encode(self.text[: self.start])), encode(self.text[self.start : self.end])
        texts = tuple(JudgedText(text=text, token_ids=tuple(encode(text))) for text in self.candidates)
        item = JudgementItem(candidates=texts, token_start=len(prefix), **span)
        return JudgementRequest(text=self.text, token_ids=(*prefix, *suffix), items=(item,), **about)

    def preference(self, answer: Judgement | JudgementFailure) -> float | None:
        """By the rewards: 1 for the better text, 0 for the other, 0.5 for a tie. None: no verdict."""
        return None if isinstance(answer, JudgementFailure) else self.preferred(answer.rewards)

    def preferred(self, scores: Sequence[float | None]) -> float | None:
        """The same of one criterion's scores of the two candidates."""
        better, worse = scores if self.better_first else reversed(scores)
        return None if better is None or worse is None else preferred(better, worse)

    def shown(self, answer: Judgement) -> dict[str, list[Showing]]:
        """By pairwise criterion, in the order in which the judge asked."""
        found: dict[str, list[Showing]] = defaultdict(list)
        place_of_better = 0 if self.better_first else 1
        for comparison in answer.comparisons:
            is_first, value = comparison.first == place_of_better, comparison.value
            of_better = value if is_first or value is None else 1 - value
            found[comparison.criterion].append(Showing(is_first, of_better))
        return dict(found)


def preferred(better: float, worse: float) -> float:
    return 0.5 if better == worse else float(better > worse)


def by_order(showings: Sequence[Showing]) -> dict[bool, float]:
    """The mean value for the better text where it was shown first (True), and where second; absent: not readable."""
    found = {}
    for order in (True, False):
        values = [showing.value for showing in showings if showing.better_first == order and showing.value is not None]
        if values:
            found[order] = sum(values) / len(values)
    return found


def is_consistent(showings: Sequence[Showing]) -> bool | None:
    """Whether the same text wins in both orders, or both are ties; None if there is no verdict in both."""
    means = by_order(showings)
    return preferred(means[True], 0.5) == preferred(means[False], 0.5) if len(means) == 2 else None
