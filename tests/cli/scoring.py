"""A judge's user function for whole runs: no model, answers at once."""

from collections.abc import Sequence


def prefer_short(prefix: str, candidates: Sequence[str], reference: str) -> list[float]:
    """Between 0.1 and 0.9; never 0, so that a failure that became a score would show."""
    del prefix, reference
    return [max(0.1, 0.9 - len(candidate) / 100) for candidate in candidates]
