"""The tree layout: a window once (the trunk), and off it a branch for each candidate that differs from the trunk.

    trunk     t0 t1 t2 t3 t4 t5 t6 t7 ...
    branch          b2 b3                 start 2: sees t0 t1 and itself; b2 is predicted by t1, b3 by b2

Log-probs are those of separate sequences: a branch goes on from the trunk's positions, and its first token is predicted
by the trunk token before its start. A suffix that equals the trunk at its place (the original, or the beginning of it)
needs no branch: it is read from the trunk. A trunk is only as long as its branches and readers need.

A branch always forks at its chunk's start, also where its first tokens equal the trunk's: a later fork would save few
tokens and give every branch a length and a start of its own, while the kernels batch equal ones.

Sharing within one pair: arXiv 2410.20305. Trees of rollouts: AReaL (arXiv 2505.24298), Tree Training (arXiv
2511.00413). Blocks at many places of one clean text: Block Diffusion (arXiv 2503.09573).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shared.records import TokenIds
from trainer.layouts.base import Pass, PassPlan, WindowPairs
from trainer.layouts.kernels import Kernel
from trainer.layouts.packing import Unit, cut, plan_passes
from trainer.layouts.shape import Segment, TreeShape
from trainer.preferences import Preference

Branch = tuple[int, TokenIds]
"""Start and tokens."""


@dataclass(frozen=True)
class TreeLayout:
    kernel: Kernel

    @property
    def attention_implementation(self) -> str:
        return self.kernel.attention_implementation

    def plan(self, windows: Sequence[WindowPairs], *, max_tokens: int, num_ranks: int = 1) -> list[list[PassPlan]]:
        """A window that exceeds `max_tokens` becomes several trees of neighbouring pairs."""
        parts = [part for window in windows for part in cut(window, self._num_tokens, ceiling=max_tokens)]
        units = [Unit(tuple(part), self._num_tokens(part)) for part in parts]
        return plan_passes(units, self._cost, max_tokens=max_tokens, num_ranks=num_ranks)

    def lay_out(self, plan: PassPlan, *, device: torch.device) -> Pass:
        return _Row(plan.windows, self.kernel).lay_out(device)

    def _cost(self, units: Sequence[Unit]) -> int:
        return _ceil(sum(unit.size for unit in units), self.kernel.bucket)

    def _num_tokens(self, pairs: Sequence[Preference]) -> int:
        tree = _Tree.of(pairs)
        return sum(_ceil(len(tokens), self.kernel.block) for tokens in (tree.trunk, *(b for _, b in tree.branches)))


@dataclass(frozen=True)
class _Tree:
    """Of one window."""

    trunk: TokenIds
    branches: tuple[Branch, ...]
    """Sorted by start."""

    @staticmethod
    def of(pairs: Sequence[Preference]) -> "_Tree":
        suffixes = [(pair, suffix) for pair in pairs for suffix in pair.suffixes]
        ends = [pair.start + (len(suffix) if _is_read(pair, suffix) else 0) for pair, suffix in suffixes]
        branches = dict.fromkeys((pair.start, suffix) for pair, suffix in suffixes if not _is_read(pair, suffix))
        return _Tree(pairs[0].trunk[: max(ends)], tuple(sorted(branches, key=lambda branch: branch[0])))


class _Row:
    """The trees of one pass in one row."""

    def __init__(self, windows: Sequence[WindowPairs], kernel: Kernel) -> None:
        self._windows, self._kernel = windows, kernel
        self._pairs = [pair for window in windows for pair in window]
        self._segments: list[Segment] = []
        self._tokens: list[int] = []
        trees = [_Tree.of(window) for window in windows]
        self._trunks = [self._append(tree.trunk) for tree in trees]
        self._branches = [
            {branch: self._append(branch[1], trunk=trunk, start=branch[0]) for branch in tree.branches}
            for tree, trunk in zip(trees, self._trunks, strict=True)
        ]
        while len(self._tokens) % kernel.bucket:
            self._append((0,))  # padding: a trunk that nothing is read from

    def _append(self, tokens: TokenIds, *, trunk: int | None = None, start: int = 0) -> int:
        """Returns where the segment begins."""
        begin = len(self._tokens)
        self._tokens += tokens
        self._tokens += [0] * (-len(tokens) % self._kernel.block)
        self._segments.append(Segment(begin, len(self._tokens), begin if trunk is None else trunk, start))
        return begin

    def lay_out(self, device: torch.device) -> Pass:
        shape = TreeShape(tuple(self._segments))
        rows, targets, lengths = self._reads()
        num_targets = torch.tensor(lengths)
        last = max(pair.start + len(suffix) for pair in self._pairs for suffix in pair.suffixes) - 1
        return Pass(
            input_ids=torch.tensor([self._tokens]).to(device),
            position_ids=shape.places().position.clamp(max=last)[None].to(device),  # padding has no place beyond it
            rows=torch.tensor(rows).to(device),
            targets=torch.tensor(targets).to(device),
            suffixes=torch.repeat_interleave(torch.arange(len(lengths)), num_targets).to(device),
            num_targets=num_targets.to(device),
            num_separate_tokens=sum(pair.start + len(suffix) for pair in self._pairs for suffix in pair.suffixes),
            attention=self._kernel.arguments(shape, device),
        )

    def _reads(self) -> tuple[list[int], list[int], list[int]]:
        """The predicting rows and target tokens of all suffixes, and the suffixes' lengths."""
        rows: list[int] = []
        targets: list[int] = []
        lengths: list[int] = []
        for side in range(len(self._windows[0][0].suffixes)):
            for index, window in enumerate(self._windows):
                for pair in window:
                    rows += self._rows(index, pair, pair.suffixes[side])
                    targets += pair.suffixes[side]
                    lengths.append(len(pair.suffixes[side]))
        return rows, targets, lengths

    def _rows(self, index: int, pair: Preference, suffix: TokenIds) -> Iterator[int]:
        first = self._trunks[index] + pair.start - 1
        begin = first + 1 if _is_read(pair, suffix) else self._branches[index][pair.start, suffix]
        yield first
        yield from range(begin, begin + len(suffix) - 1)


def _is_read(pair: Preference, suffix: TokenIds) -> bool:
    """From the trunk."""
    return pair.trunk[pair.start : pair.start + len(suffix)] == suffix


def _ceil(number: int, step: int) -> int:
    return -(-number // step) * step
