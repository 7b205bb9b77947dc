"""How long to wait before the next attempt: 0.25 s, doubled up to a bound, with jitter."""

import random

FIRST_S = 0.25


class Backoff:
    """One series of attempts. Jitter keeps many callers from coming back in step."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._next_s = min(FIRST_S, max_s)

    def next_s(self, *, at_least_s: float = 0.0) -> float:
        """Seconds to wait now: half to all of the step, or what the service asked for if that is longer."""
        wait_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._next_s * 2, self._max_s)
        return max(wait_s, at_least_s)
