"""Whether the judge still tells known pairs apart as it did at the run's beginning. Used by figures.py.

A policy that learns to please its judge, or a judge that was replaced by a worse one, shows here first: the judge
prefers a spoiled text to its original, or a text of the base policy to a human one, more often than it once did.

The test, for each kind of pair by itself. The run's first `BLOCK` pairs are the beginning. Each later block of as many,
number k = 1, 2, ..., is compared with it by Fisher's exact test, one-sided, at the level ALPHA / (k (k + 1)). These
levels sum to ALPHA, so by the union bound a judge that has not changed is reported with a probability of at most ALPHA
in a run of any length (0.05 for both kinds together). Simulated: a fall from 0.9 to 0.7 right after the beginning is
reported at the end of its first block in 89 % of runs, one from 0.95 to 0.75 in 96 %; a fall that begins after 20 quiet
blocks, by the end of its fifth block in 64 and 86 %.

The state is only a few sums, and comes back from the steps' rows when the trainer starts again.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shared.records import Probe

BLOCK = 100
ALPHA = 0.025
_KINDS = {"spoiled": "judge_probe_accuracy", "base": "judge_probe_human_over_base"}
"""Kind of pair -> the figure that has the share of originals preferred."""
_WORDS = {"spoiled": "originals to their spoiled copies", "base": "human texts to those of the base policy"}


def probe_figures(probes: Sequence[Probe]) -> dict[str, float]:
    """Absent where there is nothing to tell."""
    if not probes:
        return {}
    unreadable = sum(probe.value is None for probe in probes)
    figures = {"judge_probe_unreadable": unreadable / len(probes)}
    for kind, name in _KINDS.items():
        values = [probe.value for probe in probes if probe.kind == kind and probe.value is not None]
        if values:
            figures |= {name: math.fsum(values) / len(values), f"judge_probes_{kind}": len(values)}
    both = [probe.consistent for probe in probes if probe.consistent is not None]
    return figures | ({"judge_probe_consistency": sum(both) / len(both)} if both else {})


@dataclass(frozen=True)
class Block:
    total: float = 0.0
    """Originals preferred, ties counting half."""
    number: int = 0
    """Pairs."""

    @property
    def share(self) -> float:
        return self.total / self.number

    def plus(self, total: float, number: int) -> "Block":
        return Block(self.total + total, self.number + number)


def chance_of_fewer(first: Block, later: Block) -> float:
    """The p-value of Fisher's exact test, one-sided: how likely a judge that has not changed is to prefer the originals
    in so few of the later pairs. Half a pair is rounded in its favour."""
    wins, later_wins = math.floor(first.total), math.ceil(later.total)
    total, number = wins + later_wins, first.number + later.number
    all_ways = math.comb(number, later.number)
    fewest = max(0, total - first.number)
    ways = (math.comb(total, x) * math.comb(number - total, later.number - x) for x in range(fewest, later_wins + 1))
    return sum(ways) / all_ways


@dataclass
class FallTest:
    """Of one kind of pair."""

    size: int = BLOCK
    alpha: float = ALPHA
    first: Block | None = None
    last: Block | None = None
    """The newest whole block after the first."""
    has_fallen: bool = False
    """By the newest whole block."""
    num_compared: int = 0
    _open: Block = Block()

    def add(self, total: float, number: int) -> bool:
        """Whether these pairs completed a block that is significantly below the first. A block has `size` pairs, or
        more where a step brings several."""
        self._open = self._open.plus(total, number)
        if self._open.number < self.size:
            return False
        block, self._open = self._open, Block()
        if self.first is None:
            self.first = block
            return False
        self.last = block
        self.num_compared += 1
        level = self.alpha / (self.num_compared * (self.num_compared + 1))
        self.has_fallen = chance_of_fewer(self.first, block) <= level
        return self.has_fallen


@dataclass
class ProbeWatch:
    tests: dict[str, FallTest] = field(default_factory=lambda: {kind: FallTest() for kind in _KINDS})
    _falls: list[str] = field(default_factory=list)

    @classmethod
    def resumed(cls, rows: Iterable[Mapping[str, float]]) -> "ProbeWatch":
        """After these steps' figures, in their order. What they showed was reported then."""
        watch = cls()
        for figures in rows:
            watch.note(figures)
        watch.take_falls()
        return watch

    def note(self, figures: Mapping[str, float]) -> dict[str, float]:
        """Take a step's figures (`probe_figures`) into account, and say where the run stands by now."""
        for kind, name in _KINDS.items():
            number = int(figures.get(f"judge_probes_{kind}", 0))
            if number and self.tests[kind].add(figures[name] * number, number):
                self._falls.append(self._sentence(kind))
        return self._standing()

    def take_falls(self) -> list[str]:
        """A sentence for each block that has turned out to be significantly below the first since the last call."""
        falls, self._falls = self._falls, []
        return falls

    def _standing(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind, name in _KINDS.items():
            first, last = self.tests[kind].first, self.tests[kind].last
            if first is not None and last is not None:
                found |= {f"{name}_first": first.share, f"{name}_last": last.share}
        return found | ({"judge_probes_fell": float(any(t.has_fallen for t in self.tests.values()))} if found else {})

    def _sentence(self, kind: str) -> str:
        first, last = self.tests[kind].first, self.tests[kind].last
        assert first is not None
        assert last is not None
        return (
            f"the judge preferred {_WORDS[kind]} in {last.share:.0%} of the last {last.number} known pairs, at "
            f"the run's beginning in {first.share:.0%}: the policy may have learned to please it; "
            "`headwater judge-audit` measures the judge"
        )
