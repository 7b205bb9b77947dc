"""Where the trunks and branches of a tree lie in its packed row, and what attends to what. Read by the kernels.

    | trunk 0 | trunk 1 | branches of trunk 0 by start | branches of trunk 1 |

A token attends causally to its own segment; a branch token also to the trunk before the branch's start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """A trunk or a branch: the tokens `begin` to `end` of the row."""

    begin: int
    end: int
    trunk: int
    """Where its trunk begins; a trunk's own is `begin`."""
    start: int = 0
    """Trunk tokens before a branch; 0 for a trunk."""

    @property
    def length(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Run:
    """`count` segments of equal length side by side."""

    begin: int
    count: int
    length: int

    @property
    def end(self) -> int:
        return self.begin + self.count * self.length


@dataclass(frozen=True)
class Crossing:
    """Branches side by side with the same start: the queries `begin` to `end`, the keys `trunk` to `trunk + start`."""

    begin: int
    end: int
    trunk: int
    start: int


@dataclass(frozen=True)
class TreeShape:
    segments: tuple[Segment, ...]
    """In the order of the row, without gaps: trunks, then branches."""

    @property
    def num_tokens(self) -> int:
        return self.segments[-1].end

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        grouped = (list(group) for _, group in groupby(self.segments, key=lambda one: (one.start > 0, one.length)))
        return tuple(Run(group[0].begin, len(group), group[0].length) for group in grouped)

    @cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        branches = [one for one in self.segments if one.start]
        grouped = groupby(branches, key=lambda one: (one.trunk, one.start))
        return tuple(_crossing(list(group)) for _, group in grouped)

    def places(self) -> "Places":
        """Of every token."""
        lengths = torch.tensor([one.length for one in self.segments])

        def spread(values: Sequence[int]) -> Tensor:
            return torch.repeat_interleave(torch.tensor(values), lengths)

        offsets = torch.arange(self.num_tokens) - spread([one.begin for one in self.segments])
        starts = spread([one.start for one in self.segments])
        return Places(
            document=spread([one.trunk for one in self.segments]),
            segment=spread([one.begin for one in self.segments]),
            position=offsets + starts,
            start=starts,
        )


@dataclass(frozen=True)
class Places:
    """(S,) long each."""

    document: Tensor
    """Where its trunk begins."""
    segment: Tensor
    """Where its own segment begins: equal to `document` in a trunk."""
    position: Tensor
    """In its own sequence, from 0."""
    start: Tensor
    """Of its branch; 0 in a trunk."""

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether token `query` sees token `key`; the indices broadcast."""
        own = (self.segment[query] == self.segment[key]) & (self.position[key] <= self.position[query])
        trunk = (self.segment[key] == self.document[query]) & (self.position[key] < self.start[query])
        return own | trunk

    def to(self, device: torch.device) -> "Places":
        return Places(*(getattr(self, name).to(device) for name in ("document", "segment", "position", "start")))


def _crossing(branches: Sequence[Segment]) -> Crossing:
    return Crossing(branches[0].begin, branches[-1].end, branches[0].trunk, branches[0].start)
