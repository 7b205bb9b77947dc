"""What known pairs say about a judge: shares with intervals, by criterion. Pure; judge_audit.py asks and prints.

A pair counts once, however often the judge was asked about it: 1 if the better text won, 0 if it lost, 0.5 for a tie.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.known_pairs import Spoiling
from services.pair_questions import Showing, by_order, is_consistent, preferred

_Z = 1.959964
"""Of a two-sided interval of 95 %."""


@dataclass(frozen=True)
class Share:
    total: float
    number: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Share":
        found = list(values)
        return cls(math.fsum(found), len(found))

    @property
    def mean(self) -> float:
        return self.total / self.number

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by Wilson (1927): it stays inside [0, 1] and does not shrink to nothing at 0 or 1. Ties make it a
        little too wide."""
        n, z2 = self.number, _Z * _Z
        middle = (self.mean + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z / (1 + z2 / n) * math.sqrt(self.mean * (1 - self.mean) / n + z2 / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_data(self) -> dict[str, Any]:
        """`value` is None where there was nothing to count."""
        if not self.number:
            return {"value": None, "number": 0}
        low, high = self.interval
        return {"value": self.mean, "low": low, "high": high, "number": self.number}


@dataclass(frozen=True)
class PairAnswer:
    """What one criterion, or the combined reward, said about one pair."""

    spoiling: Spoiling
    scored: float | None
    """By the scores of the two texts: 1, 0.5 or 0; None: there are none."""
    showings: tuple[Showing, ...] = ()
    """Of a pairwise criterion."""
    causes: tuple[str, ...] = ()
    """Of answers that failed as a whole."""
    num_calls: int = 0
    num_failures: int = 0

    @property
    def value(self) -> float | None:
        """Both orders weigh the same, however often each was asked; without showings by the scores."""
        if not self.showings:
            return self.scored
        means = by_order(self.showings)
        return preferred(sum(means.values()) / len(means), 0.5) if means else None


@dataclass(frozen=True)
class CriterionFigures:
    name: str
    accuracy: Share
    by_spoiling: dict[Spoiling, Share]
    share_of_first: float | None
    """How often the text shown as A won, both orders weighing the same; None for criteria that compare no pairs."""
    consistency: Share
    """Pairs shown in both orders in which the same text won twice."""
    ties: Share
    """Pairs without a winner."""
    num_pairs: int
    unreadable: dict[str, int]
    """By cause: verdicts, or whole answers, that are missing for good. `no_verdict`: one comparison, `unscored`: a text
    without a score."""
    num_calls: int
    num_failures: int
    """Answers that could not be read and were asked for again."""
    seconds: float
    """Of all its pairs, as many asked at once as the run would."""
    notes: tuple[str, ...] = field(default=())


def figures_of(name: str, answers: Sequence[PairAnswer], *, seconds: float) -> CriterionFigures:
    judged = [(answer, answer.value) for answer in answers if answer.value is not None]
    kinds = dict.fromkeys(answer.spoiling for answer in answers)
    both = [found for answer in answers if (found := is_consistent(answer.showings)) is not None]
    return CriterionFigures(
        name=name,
        accuracy=Share.of(value for _, value in judged),
        by_spoiling={
            kind: Share.of(value for answer, value in judged if answer.spoiling == kind) for kind in sorted(kinds)
        },
        share_of_first=_share_of_first([showing for answer in answers for showing in answer.showings]),
        consistency=Share.of(map(float, both)),
        ties=Share.of(float(value == 0.5) for _, value in judged),
        num_pairs=len(answers),
        unreadable=dict(_unreadable(answers)),
        num_calls=sum(answer.num_calls for answer in answers),
        num_failures=sum(answer.num_failures for answer in answers),
        seconds=seconds,
    )


def _share_of_first(showings: Sequence[Showing]) -> float | None:
    """With the better text as A the first wins where it wins, as B where it loses."""
    shares = []
    for order in (True, False):
        values = [one.value for one in showings if one.better_first == order and one.value is not None]
        if not values:
            return None
        won = sum(preferred(value, 0.5) for value in values) / len(values)
        shares.append(won if order else 1 - won)
    return sum(shares) / 2


def _unreadable(answers: Sequence[PairAnswer]) -> Counter[str]:
    found = Counter(cause for answer in answers for cause in answer.causes)
    found["no_verdict"] = sum(showing.value is None for answer in answers for showing in answer.showings)
    found["unscored"] = sum(answer.value is None and not answer.showings and not answer.causes for answer in answers)
    return +found


def as_data(figures: CriterionFigures) -> dict[str, Any]:
    """What `--json` has of one criterion."""
    return {
        "accuracy": figures.accuracy.as_data(),
        "by_spoiling": {kind: share.as_data() for kind, share in figures.by_spoiling.items()},
        "share_of_first": figures.share_of_first,
        "consistency": figures.consistency.as_data(),
        "ties": figures.ties.as_data(),
        "pairs": figures.num_pairs,
        "unreadable": figures.unreadable,
        "calls": figures.num_calls,
        "asked_again": figures.num_failures,
        "seconds": figures.seconds,
    }


_HEAD = ("", "pairs", "accuracy", "95 % interval", "A wins", "consistent", "ties", "unreadable", "calls", "seconds")


def as_table(found: Sequence[CriterionFigures]) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEAD]
    for figures in found:
        counts = (str(sum(figures.unreadable.values())), f"{figures.num_calls:,}", f"{figures.seconds:.1f}")
        first = "-" if figures.share_of_first is None else f"{figures.share_of_first:.2f}"
        rows.append(
            (figures.name, *_shown(figures.accuracy), first, _mean(figures.consistency), _mean(figures.ties), *counts)
        )
        rows += [(f"  {kind}", *_shown(share), *[""] * 6) for kind, share in figures.by_spoiling.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return [
        "  ".join(
            word.ljust(width) if not column else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shown(share: Share) -> tuple[str, str, str]:
    if not share.number:
        return "0", "-", "-"
    low, high = share.interval
    return str(share.number), f"{share.mean:.3f}", f"{low:.3f}-{high:.3f}"


def _mean(share: Share) -> str:
    return f"{share.mean:.2f}" if share.number else "-"
