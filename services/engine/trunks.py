"""Which tokens must pass through the model so that every prompt's keys and values are known, each stretch once.

Where one prompt is the beginning of another, only the longer one is run: the chunks of one document are prompts of
this kind. Where several prompts begin alike and then part, what they share is run once and each goes on from there:
the questions about one chunk's candidates are of this kind.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

Tokens = tuple[int, ...]

MIN_SAVED_TOKENS = 64
"""A shared beginning is run by itself if that saves so many tokens: another pass has a cost of its own."""


@dataclass(frozen=True)
class Branch:
    """One sequence to run from where its stem ends, and the prompts that end on that way."""

    token_ids: Tokens
    """The stem's tokens included."""
    prompts: tuple[Tokens, ...]
    stem: Tokens = ()
    """`token_ids` of the branch that this one goes on from."""


def plan_branches(prompts: Iterable[Tokens]) -> list[list[Branch]]:
    """Branches by level: first those without a stem, then those that go on from them, and so on; longest first.

    Every distinct prompt belongs to exactly one branch.
    Example: (1, 2), (1, 2, 3), (7,) -> one level: (1, 2, 3) with two prompts and (7,) with one.
    """
    left = set(prompts)
    lengths = sorted({len(prompt) for prompt in left}, reverse=True)
    levels: list[list[Branch]] = []
    for level, stem, token_ids in _grow(left):
        inside = [token_ids[:length] for length in lengths if len(stem) < length <= len(token_ids)]
        own = tuple(prompt for prompt in inside if prompt in left)
        left.difference_update(own)
        if level == len(levels):
            levels.append([])
        levels[level].append(Branch(token_ids, own, stem))
    return [sorted(level, key=lambda branch: -len(branch.token_ids)) for level in levels]


def _grow(prompts: Iterable[Tokens]) -> Iterator[tuple[int, Tokens, Tokens]]:
    """(level, stem, tokens) of every branch, a stem before what goes on from it."""
    ordered = sorted(prompts)
    # In sorted order a prompt that begins any other begins the one right after it.
    ends = [prompt for prompt, after in pairwise(ordered) if after[: len(prompt)] != prompt] + ordered[-1:]
    left: list[tuple[list[Tokens], Tokens, int]] = [(ends, (), 0)] if ends else []
    while left:
        group, stem, level = left.pop()
        if len(group) == 1:
            yield level, stem, group[0]
            continue
        shared = _common_length(group[0], group[-1])
        if (len(group) - 1) * (shared - len(stem)) >= MIN_SAVED_TOKENS:
            yield level, stem, group[0][:shared]
            stem, level = group[0][:shared], level + 1
        parted = [list(alike) for _, alike in groupby(group, key=lambda end: end[shared])]
        left.extend((alike, stem, level) for alike in reversed(parted))


def _common_length(first: Tokens, last: Tokens) -> int:
    """How many tokens everything between two sorted sequences begins with."""
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def pack(lengths: Sequence[int], *, max_tokens: int, max_rows: int | None = None) -> list[range]:
    """Runs of rows that fit into one padded batch; `lengths` must descend. A row too long for any goes alone.

    Example: lengths (5, 5, 2), max_tokens 10 -> rows 0..1, row 2.
    """
    runs: list[range] = []
    start = 0
    for index in range(1, len(lengths) + 1):
        rows = index + 1 - start
        full = index < len(lengths) and (
            rows * lengths[start] > max_tokens or (max_rows is not None and rows > max_rows)
        )
        if index == len(lengths) or full:
            runs.append(range(start, index))
            start = index
    return runs
