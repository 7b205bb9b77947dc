"""Functions as a user would write them for the python criterion."""

import time

from shared.errors import HeadwaterError


def by_length(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [min(1.0, len(candidate) / len(reference)) for candidate in candidates]


async def awaited(prefix: str, candidates: list[str], reference: str) -> tuple[float, ...]:
    return tuple(1.0 if candidate == reference else 0.0 for candidate in candidates)


def counts_on(prefix: str, candidates: list[str], reference: str) -> list[float]:
    """1 for a candidate that begins with the number after the prefix's last one, as the reference must, in texts of
    numbers modulo 1000."""
    following = (int(prefix[-4:]) + 1) % 1000
    assert int(reference[:4]) == following, (prefix[-8:], reference[:8])
    return [float(int(candidate[:4]) == following) for candidate in candidates]


def unless_empty(prefix: str, candidates: list[str], reference: str) -> list[float | None]:
    return [float(candidate == reference) if candidate else None for candidate in candidates]


def too_few(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [0.5]


def too_high(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [1.5 for _ in candidates]


def not_a_number(prefix: str, candidates: list[str], reference: str) -> list[float]:
    return [float("nan") for _ in candidates]


def no_list(prefix: str, candidates: list[str], reference: str) -> None:
    return None


def raising(prefix: str, candidates: list[str], reference: str) -> list[float]:
    raise HeadwaterError("no such entry")


def slow(prefix: str, candidates: list[str], reference: str) -> list[float]:
    time.sleep(0.3)
    return [1.0 for _ in candidates]


NOT_CALLABLE = 3
