"""The trainer's side of the stream: reads windows, filters them, and holds their pairs until a checkpoint has them.

    delivery -> duplicate? newer? stale? no pair? -> held -> taken by steps -> finished
    checkpoint and its evidence on disk -> ledger: trained -> stream: acknowledged -> forgotten

`fill` is where the trainer blocks until a collector writes, `stop` is set, or the source ends. Windows are read one at
a time, so that nothing beyond the next step's needs is held and grows stale.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from shared import metrics
from shared.checkpoint_state import FinishedWindow, PartialWindow
from shared.errors import TrainingError
from shared.records import WindowKey
from shared.settings import Settings
from shared.stream import BrokenEntry, StreamEntry
from trainer.connections import Connections
from trainer.figures import Tally
from trainer.preferences import Preference, select_pairs

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A window since the last checkpoint."""

    entry_id: str
    unused: deque[Preference]
    used: int
    step: int | None
    """The last applied update that contains one of its pairs."""
    pairs_by_step: Counter[int]
    """Applied update -> how many of its pairs are in it."""


class Inbox:
    def __init__(
        self, settings: Settings, connections: Connections, *, partial: Mapping[str, PartialWindow], tally: Tally
    ) -> None:
        """`partial`: the windows that were half used at the checkpoint that the trainer resumes from."""
        self._settings, self._connections, self._tally = settings, connections, tally
        self._partial = dict(partial)
        self._held: dict[str, _Held] = {}
        self.num_pairs = 0
        """Pairs held and not yet taken."""

    def fill(self, num_pairs: int, *, weight_version: int) -> None:
        """Read until `num_pairs` are held, `stop` is set, or the source has ended. Drops windows more than
        `max_policy_lag` versions behind `weight_version`, and those ahead of it. Raises TrainingError when nothing
        arrives for `trainer.stream_timeout_s`."""
        arrived = time.monotonic()
        while self.num_pairs < num_pairs and not self._connections.stop.is_set():
            delivery = self._connections.deliveries.next()
            if delivery is not None:
                self._admit(delivery, weight_version)
                arrived = time.monotonic()
            elif self._source_has_ended():
                return
            elif (limit_s := self._settings.trainer.stream_timeout_s) and time.monotonic() - arrived > limit_s:
                raise TrainingError(
                    f"no window arrived for {limit_s:g} s (trainer.stream_timeout_s): is a collector running, and are "
                    "the services that it calls ready?"
                )

    def take(self, num_pairs: int) -> list[Preference]:
        """Up to `num_pairs`, oldest window first. They count as used; `mark_applied` says that they were trained."""
        taken: list[Preference] = []
        for held in self._held.values():
            while held.unused and len(taken) < num_pairs:
                taken.append(held.unused.popleft())
                held.used += 1
        self.num_pairs -= len(taken)
        return taken

    def mark_applied(self, pairs: list[Preference], step: int) -> None:
        for pair in pairs:
            held = self._held[pair.window_id]
            held.step = step
            held.pairs_by_step[step] += 1

    def finished(self) -> dict[str, FinishedWindow]:
        """Windows whose pairs are all used, by id."""
        return {
            window_id: FinishedWindow(
                entry_id=held.entry_id,
                step=held.step,
                pairs_by_step=dict(held.pairs_by_step),
                num_skipped=held.used - held.pairs_by_step.total(),
            )
            for window_id, held in self._held.items()
            if not held.unused
        }

    def partial(self) -> dict[str, PartialWindow]:
        """Half-used windows by id, also those not yet redelivered since a resume."""
        begun = {
            window_id: PartialWindow(used=held.used, step=held.step, pairs_by_step=dict(held.pairs_by_step))
            for window_id, held in self._held.items()
            if held.unused and held.used
        }
        return self._partial | begun

    def commit(self, finished: Mapping[str, FinishedWindow]) -> None:
        """A checkpoint that contains these windows is on disk: mark, acknowledge and forget them."""
        commit_finished(finished, self._connections)
        for window_id in finished:
            del self._held[window_id]

    def _admit(self, delivery: StreamEntry | BrokenEntry, weight_version: int) -> None:
        if isinstance(delivery, BrokenEntry):
            return self._drop_broken(delivery)
        window = delivery.window
        held = self._held.get(window.window_id)
        if held is not None and held.entry_id == delivery.entry_id:
            return None  # the same delivery once more: it must stay pending
        if held is not None or self._is_finished(window.window_id):
            self._tally.counts["duplicate_windows"] += 1
            _log.info("window %s came again as entry %s", window.window_id, delivery.entry_id)
            return self._acknowledge(delivery)
        begun = self._partial.get(window.window_id)
        if begun is None and window.weight_versions:
            oldest, newest = min(window.weight_versions), max(window.weight_versions)
            read = f"read at version {weight_version}"
            # Version 0 is also that of a replica that has loaded nothing yet.
            if newest > max(weight_version, 0):  # this trainer has not published it: rollouts of another policy
                return self._drop(delivery, "newer_than_policy", f"sampled under version {newest}, {read}")
            if weight_version - oldest > self._settings.trainer.max_policy_lag:
                self._tally.counts["stale_windows"] += 1
                return self._drop(delivery, "stale", f"sampled under version {oldest}, {read}")
        return self._hold(delivery, begun)

    def _hold(self, entry: StreamEntry, begun: PartialWindow | None) -> None:
        window, trainer = entry.window, self._settings.trainer
        seed = self._settings.run.seed
        selection = select_pairs(window, trainer.objective, min_reward_gap=trainer.min_reward_gap, seed=seed)
        self._tally.add_window(window, selection)
        if not selection.pairs and begun is None:
            self._tally.counts["no_preference_windows"] += 1
            why = (
                f"{selection.no_preference} chunks without a preference, {selection.missing} without the needed "
                f"candidates, of {len(window.chunks) + len(window.dropped_chunks)}"
            )
            return self._drop(entry, "no_preference", why)
        self._partial.pop(window.window_id, None)
        used, step, pairs_by_step = (begun.used, begun.step, begun.pairs_by_step) if begun else (0, None, {})
        unused = deque(selection.pairs[used:])
        self._held[window.window_id] = _Held(entry.entry_id, unused, used, step, Counter(pairs_by_step))
        self.num_pairs += len(unused)
        return None

    def _is_finished(self, window_id: str) -> bool:
        return bool(self._connections.ledger.finished_among([window_id]))

    def _drop(self, entry: StreamEntry, reason: str, detail: str) -> None:
        """The ledger first: after a crash in between, the redelivered entry is known as dropped."""
        window = entry.window
        if self._connections.ledger.drop(window.key, reason=reason, detail=detail, source_id=window.source_id):
            metrics.windows_dropped_total.labels(reason).inc()
        self._acknowledge(entry)

    def _drop_broken(self, entry: BrokenEntry) -> None:
        self._tally.counts["broken_windows"] += 1
        _log.error("entry %s (window %r) is broken: %s", entry.entry_id, entry.window_id, entry.reason)
        try:
            key = WindowKey.parse(entry.window_id)
        except ValueError:
            key = None
        if key is not None and entry.window_id not in self._held and not self._is_finished(entry.window_id):
            self._connections.ledger.drop(key, reason="broken_entry", detail=entry.reason)
        self._acknowledge(entry)

    def _acknowledge(self, entry: StreamEntry | BrokenEntry) -> None:
        self._connections.stream.acknowledge({entry.entry_id: entry.window_id})

    def _source_has_ended(self) -> bool:
        """Nothing is written once the source is exhausted, so that is asked first: an empty stream then stays empty."""
        source, connections = self._settings.documents, self._connections
        extent = connections.run.extent(max_epochs=source.max_epochs)
        ended = connections.coordination.source_exhausted(num_parts=source.num_parts, extent=extent)
        return ended and connections.stream.backlog().unread == 0


def commit_finished(finished: Mapping[str, FinishedWindow], connections: Connections) -> None:
    """The ledger first, then the stream. Repeating it, as after a crash in between, changes nothing."""
    steps = {window_id: window.step for window_id, window in finished.items() if window.step is not None}
    num_pairs = {window_id: window.num_pairs for window_id, window in finished.items() if window.num_pairs}
    connections.ledger.mark_trained(steps, num_pairs=num_pairs)
    for window_id in finished.keys() - steps.keys():
        connections.ledger.drop(WindowKey.parse(window_id), reason="non_finite_loss")
    connections.stream.acknowledge({window.entry_id: window_id for window_id, window in finished.items()})
