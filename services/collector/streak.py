"""Windows in a row that could not be scored. Too many stop the collector before it has used up the corpus in vain.

    dropped    held back: it stays `reading` in the ledger
    scored     the streak was chance: the windows that were held back are dropped
    too many   CollectingError; they are still `reading`, so the next collector works on them again

Windows that are dropped for a reason of their own (DroppedWindow.is_in_vain is False) neither count nor end a streak.
All parts of a collector share one streak. Called by parts.py.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.collector.collect import DroppedWindow
from services.collector.windows import Window
from shared import metrics
from shared.errors import CollectingError, FencedError
from shared.records import Lease

Drop = Callable[[Window, Lease, DroppedWindow], Awaitable[None]]
"""Enters it in the ledger."""


@dataclass(frozen=True)
class _Held:
    window: Window
    lease: Lease
    outcome: DroppedWindow


@dataclass
class Streak:
    most: int
    """collector.max_dropped_windows."""
    drop: Drop
    _held: list[_Held] = field(default_factory=list)
    _reasons: Counter[str] = field(default_factory=Counter)
    """Of all windows of the streak, those of parts that have ended included."""

    def hold(self, window: Window, lease: Lease, outcome: DroppedWindow) -> None:
        """Raises CollectingError when there are too many."""
        self._held.append(_Held(window, lease, outcome))
        self._reasons[outcome.reason] += 1
        metrics.windows_held_back.set(len(self._held))
        if self._reasons.total() < self.most:
            return
        counts = ", ".join(f"{reason} {number}" for reason, number in self._reasons.most_common())
        raise CollectingError(
            f"{self.most} windows in a row could not be scored ({counts}), the last one: {outcome.detail}. The next "
            "start works on them again: mend what the reason names first, or raise collector.max_dropped_windows"
        )

    async def end(self) -> None:
        """A window was scored."""
        held, self._held = self._held, []
        self._reasons.clear()
        metrics.windows_held_back.set(0)
        for one in held:
            try:
                await self.drop(one.window, one.lease, one.outcome)
            except FencedError:  # its part is another collector's now, which works on it again
                continue

    async def end_part(self, lease: Lease) -> None:
        """The part has no more windows: its own are dropped, and still count."""
        for one in self._leave(lease):
            await self.drop(one.window, one.lease, one.outcome)

    def forget(self, lease: Lease) -> None:
        """The part was lost, and with it what it has held back."""
        self._leave(lease)

    def _leave(self, lease: Lease) -> list[_Held]:
        left = [one for one in self._held if one.lease == lease]
        self._held = [one for one in self._held if one.lease != lease]
        metrics.windows_held_back.set(len(self._held))
        return left
