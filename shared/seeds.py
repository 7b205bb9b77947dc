"""Every seed of a run, derived from `run.seed` or a request's seed and from what it is for.

The same parts always give the same seed, so a window that is read again draws the same chunks and asks the same:

    seed_of(settings.run.seed, window.key, "judge")     # the judge's request for one window
    derive_seed(request.seed, request.starts[0], bits=48)

A change of any value here changes what a run that is under way draws: raise `FORM` (shared/records.py) with it.
"""

import hashlib
from typing import Literal

from shared.records import WindowKey


def seed_of(run_seed: int, key: WindowKey, purpose: str) -> int:
    """The collector's, 31 bits: services add a row's number to it."""
    return _digest(f"{run_seed}/{key}/{purpose}", num_bytes=4) >> 1


def share_of(key: WindowKey, purpose: str) -> float:
    """A fixed number in [0, 1), to draw a share of all windows."""
    return seed_of(0, key, purpose) / 2**31


def shuffle_seed(*place: int) -> int:
    """Of a block of documents: the run's seed, part, epoch and block, then the piece if the block is in pieces."""
    return _digest(".".join(map(str, place)), num_bytes=8)


def question_seed(seed: int, *place: int | str) -> int:
    """The judge's, 31 bits, for one question at this place in a request."""
    return int.from_bytes(hashlib.sha256(repr((seed, *place)).encode()).digest()[:4], "big") >> 1


def derive_seed(*parts: int, bits: int) -> int:
    """An engine's, in whole bytes. Engines count up from a seed row by row: those of neighbours must lie far apart."""
    return _digest(".".join(map(str, parts)), num_bytes=bits // 8, order="little")


def _digest(text: str, *, num_bytes: int, order: Literal["big", "little"] = "big") -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=num_bytes).digest(), order)
