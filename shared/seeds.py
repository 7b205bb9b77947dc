"""Seeds that depend only on the run's seed and on what they are for: a window that is redone asks the same again."""

import hashlib

from shared.records import WindowKey


def seed_of(run_seed: int, key: WindowKey, purpose: str) -> int:
    """In 0 .. 2**31 - 1: services add the row's number to it."""
    digest = hashlib.blake2b(f"{run_seed}/{key}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def share_of(key: WindowKey, purpose: str) -> float:
    """A fixed number in [0, 1) for this window, to draw a share of all windows."""
    return seed_of(0, key, purpose) / 2**31
