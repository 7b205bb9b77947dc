"""Back-pressure: a window starts only while there is room for it.

    who blocks      `enter`, while max_documents_in_flight windows are at work, or in flight + unread on the stream
                    has reached max_backlog
    who unblocks    `leave`, when a window is finished or dropped; `note_backlog`, when the trainer has read

A written window counts as unread at once (`note_written`, before its `leave`), so that between two looks at the
stream the sum never falls by itself.
"""

import asyncio

from shared import metrics


class Gate:
    """One per collector. Several collectors each see the whole stream's unread, but only their own in flight."""

    def __init__(self, *, max_in_flight: int, max_backlog: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_backlog = max_backlog
        self._changed = asyncio.Event()
        self._num_written = 0
        self.in_flight = 0
        self.unread = 0

    async def enter(self) -> None:
        """Take a place; give it back by `leave`."""
        await self.wait_open()
        self.in_flight += 1  # no await since the check: two waiters can't take the same place
        metrics.documents_in_flight.set(self.in_flight)

    async def wait_open(self) -> None:
        """Until there is a place, without taking it: nothing is read far ahead of the work."""
        while not self.is_open:
            self._changed.clear()
            await self._changed.wait()

    @property
    def is_open(self) -> bool:
        return self.in_flight < self._max_in_flight and self.in_flight + self.unread < self._max_backlog

    def leave(self) -> None:
        self.in_flight -= 1
        metrics.documents_in_flight.set(self.in_flight)
        self._changed.set()

    def note_written(self) -> None:
        self._num_written += 1
        self.unread += 1

    @property
    def num_written(self) -> int:
        """Remember it before looking at the stream, for `note_backlog`."""
        return self._num_written

    def note_backlog(self, unread: int, *, written_before: int) -> None:
        """What the stream said. Windows written since that look began may be missing in it, so they are added: the
        sum may be a little high until the next look, never too low."""
        self.unread = unread + self._num_written - written_before
        self._changed.set()
