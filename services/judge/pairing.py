"""Which candidates are compared. All pairs for now; a tournament can choose fewer behind the same kind of function."""

from itertools import combinations

Pair = tuple[int, int]
"""Two different places among the candidates, the lower one first."""


def all_pairs(num_candidates: int) -> list[Pair]:
    """All n(n-1)/2 pairs: (0, 1), (0, 2), ..., (1, 2), ..."""
    return list(combinations(range(num_candidates), 2))
