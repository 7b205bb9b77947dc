"""Which prompts must be prefilled: where one prompt is the beginning of another, only the longer one.

The chunks of one document are prompts of this kind: their keys and values are those of the longest one, cut.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Trunk:
    """One sequence to prefill, and the prompts that are beginnings of it (itself among them)."""

    token_ids: Tokens
    prompts: tuple[Tokens, ...]


def plan_trunks(prompts: Iterable[Tokens]) -> list[Trunk]:
    """Trunks in order of length, longest first; every distinct prompt belongs to exactly one.

    Example: (1, 2), (1, 2, 3), (7,) -> trunks (1, 2, 3) with two prompts and (7,) with one.
    """
    trunks: list[list[Tokens]] = []
    # In sorted order a prompt that begins any other begins the one right after it.
    for prompt in sorted(set(prompts), reverse=True):
        if trunks and trunks[-1][0][: len(prompt)] == prompt:
            trunks[-1].append(prompt)
        else:
            trunks.append([prompt])
    return sorted((Trunk(members[0], tuple(members)) for members in trunks), key=lambda trunk: -len(trunk.token_ids))


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
