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
from dataclasses import dataclass, field

from shared import metrics
from shared.checkpoint_state import FinishedWindow, PartialWindow
from shared.errors import TrainingError
from shared.records import ScoredWindow, WindowKey
from shared.settings import Settings
from shared.stream import BrokenEntry, StreamEntry
from trainer.connections import Connections
from trainer.figures import Tally
from trainer.preferences import Preference, Selection, select_pairs

_log = logging.getLogger(__name__)


@dataclass
class _Held:
    """A window since the last checkpoint."""

    entry_id: str
    unused: deque[Preference]
    used: int = 0
    step: int | None = None
    """The last applied update that contains one of its pairs."""
    pairs_by_step: Counter[int] = field(default_factory=Counter)
    """Applied update -> how many of its pairs are in it."""

    @property
    def num_skipped(self) -> int:
        return self.used - self.pairs_by_step.total()


class Inbox:
    def __init__(
        self, settings: Settings, connections: Connections, *, partial: Mapping[str, PartialWindow], tally: Tally
    ) -> None:
        """`partial`: the windows that were half used at the checkpoint from which the trainer resumes."""
        self._settings = settings
        self._connections = connections
        self._tally = tally
        self._partial = dict(partial)
        self._held: dict[str, _Held] = {}
        self.num_pairs = 0
        """Pairs held and not yet taken."""

    def fill(self, num_pairs: int, *, weight_version: int) -> None:
        """Read until `num_pairs` are held, `stop` is set, or the source has ended.

        Drops windows more than `max_policy_lag` versions behind `weight_version`, and those ahead of it.
        Raises TrainingError when nothing arrives for `trainer.stream_timeout_s`.
        """
        arrived = time.monotonic()
        while self.num_pairs < num_pairs and not self._connections.stop.is_set():
            delivery = self._connections.deliveries.next()
            if delivery is not None:
                self._admit(delivery, weight_version)
                arrived = time.monotonic()
            elif self._source_has_ended():
                return
            else:
                self._refuse_silence(time.monotonic() - arrived)

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
        """These pairs are part of update `step`."""
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
                num_skipped=held.num_skipped,
            )
            for window_id, held in self._held.items()
            if not held.unused
        }

    def partial(self) -> dict[str, PartialWindow]:
        """Half-used windows by id, those included that were not redelivered since a resume."""
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
            return self._acknowledge_duplicate(delivery)
        begun = self._partial.get(window.window_id)
        # Version 0 is also that of a replica that has loaded nothing yet.
        if begun is None and max(window.weight_versions, default=0) > max(weight_version, 0):
            return self._drop_newer(delivery, weight_version)
        if begun is None and _lag(window, weight_version) > self._settings.trainer.max_policy_lag:
            return self._drop_stale(delivery, weight_version)
        return self._hold(delivery, begun)

    def _hold(self, entry: StreamEntry, begun: PartialWindow | None) -> None:
        window = entry.window
        selection = self._select(window)
        self._tally.add_window(window, selection)
        if not selection.pairs and begun is None:
            self._tally.count("no_preference_windows")
            return self._drop(entry, "no_preference", _why_no_pair(selection, window))
        self._partial.pop(window.window_id, None)
        held = _Held(entry.entry_id, deque(selection.pairs))
        if begun:
            unused, pairs_by_step = deque(selection.pairs[begun.used :]), Counter(begun.pairs_by_step)
            held = _Held(entry.entry_id, unused, begun.used, begun.step, pairs_by_step)
        self._held[window.window_id] = held
        self.num_pairs += len(held.unused)
        return None

    def _select(self, window: ScoredWindow) -> Selection:
        trainer = self._settings.trainer
        return select_pairs(
            window, trainer.objective, min_reward_gap=trainer.min_reward_gap, seed=self._settings.run.seed
        )

    def _is_finished(self, window_id: str) -> bool:
        return bool(self._connections.ledger.finished_among([window_id]))

    def _acknowledge_duplicate(self, entry: StreamEntry) -> None:
        self._tally.count("duplicate_windows")
        _log.info("window %s came again as entry %s", entry.window.window_id, entry.entry_id)
        self._acknowledge(entry)

    def _drop_stale(self, entry: StreamEntry, weight_version: int) -> None:
        self._tally.count("stale_windows")
        metrics.stale_windows_total.inc()
        oldest = entry.window.oldest_weight_version
        self._drop(entry, "stale", f"sampled under version {oldest}, read at version {weight_version}")

    def _drop_newer(self, entry: StreamEntry, weight_version: int) -> None:
        """Rollouts of another policy: this trainer has not published that version."""
        newest = max(entry.window.weight_versions)
        self._drop(entry, "newer_than_policy", f"sampled under version {newest}, read at version {weight_version}")

    def _drop(self, entry: StreamEntry, reason: str, detail: str) -> None:
        """The ledger first: after a crash in between, the redelivered entry is known as dropped."""
        window = entry.window
        if self._connections.ledger.drop(window.key, reason=reason, detail=detail, source_id=window.source_id):
            metrics.windows_dropped_total.labels(reason).inc()
        self._acknowledge(entry)

    def _drop_broken(self, entry: BrokenEntry) -> None:
        self._tally.count("broken_windows")
        _log.error("entry %s (window %r) is broken: %s", entry.entry_id, entry.window_id, entry.reason)
        key = _parsed_key(entry.window_id)
        if key is not None and entry.window_id not in self._held and not self._is_finished(entry.window_id):
            self._connections.ledger.drop(key, reason="broken_entry", detail=entry.reason)
        self._acknowledge(entry)

    def _acknowledge(self, entry: StreamEntry | BrokenEntry) -> None:
        self._connections.stream.acknowledge({entry.entry_id: entry.window_id})

    def _source_has_ended(self) -> bool:
        """Whether it is exhausted is asked first: nothing is written after that, so an empty stream stays empty."""
        source, connections = self._settings.documents, self._connections
        extent = connections.run.extent(max_epochs=source.max_epochs)
        ended = connections.coordination.source_exhausted(num_parts=source.num_parts, extent=extent)
        return ended and connections.stream.backlog().unread == 0

    def _refuse_silence(self, idle_s: float) -> None:
        limit_s = self._settings.trainer.stream_timeout_s
        if limit_s and idle_s > limit_s:
            raise TrainingError(
                f"no window arrived for {idle_s:.0f} s (trainer.stream_timeout_s = {limit_s:g}): is a collector "
                "running, and are the services that it calls ready?"
            )


def commit_finished(finished: Mapping[str, FinishedWindow], connections: Connections) -> None:
    """The ledger first, then the stream. Repeating it, as after a crash in between, changes nothing."""
    steps = {window_id: window.step for window_id, window in finished.items() if window.step is not None}
    num_pairs = {window_id: window.num_pairs for window_id, window in finished.items() if window.num_pairs}
    connections.ledger.mark_trained(steps, num_pairs=num_pairs)
    for window_id in finished.keys() - steps.keys():
        connections.ledger.drop(WindowKey.parse(window_id), reason="non_finite_loss")
    connections.stream.acknowledge({window.entry_id: window_id for window_id, window in finished.items()})


def _lag(window: ScoredWindow, weight_version: int) -> int:
    oldest = window.oldest_weight_version
    return 0 if oldest is None else weight_version - oldest


def _why_no_pair(selection: Selection, window: ScoredWindow) -> str:
    return (
        f"{selection.no_preference} chunks without a preference, {selection.missing} without the needed candidates, "
        f"of {len(window.chunks) + len(window.dropped_chunks)}"
    )


def _parsed_key(window_id: str) -> WindowKey | None:
    try:
        return WindowKey.parse(window_id)
    except ValueError:
        return None
