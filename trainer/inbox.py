"""The trainer's side of the stream: gives each step its whole windows, and holds them until a checkpoint has them.

    reader (reader.py) -> duplicate? broken? newer? stale? no pair? -> taken by one step -> applied -> finished
    checkpoint and its evidence on disk -> ledger: trained -> stream: acknowledged -> forgotten

    windows = inbox.take(step)               # None: not yet, ask again; []: the source has ended
    inbox.mark_applied(windows, step)        # or inbox.drop_skipped(windows)
    finished = inbox.finished()              # for the checkpoint, which then calls inbox.commit(finished)

Whether a window is too old is decided when a step takes it, in the order of the stream and in optimizer steps: a run
that is resumed decides as before. `commit` may be called from another thread, everything else from the loop's.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shared import metrics
from shared.checkpoint_state import FinishedWindow
from shared.errors import TrainingError
from shared.records import NON_FINITE, WindowKey
from shared.settings import Settings
from shared.stream import BrokenEntry, StreamEntry
from trainer.connections import Connections
from trainer.figures import Tally
from trainer.layouts.base import WindowPairs
from trainer.preferences import Selection
from trainer.publisher import PublishedSteps
from trainer.reader import Arrival, Duplicate, Ended, Prepared, Reader

_REMEDIES = {
    "stale": "raise trainer.max_policy_lag, or lower collector.max_backlog so that windows wait for less long",
    "newer_than_policy": "rollout replicas serve weights that this run has not published: give them its weights.store "
    "and redis.url, and restart them",
    "no_preference": "look at the judge's rewards, trainer.min_reward_gap, and the kinds in collector.schedule",
    "barred": "most chunks have no candidate above the thresholds of judge.criteria: lower one, or add kinds that pass",
    "broken_entry": "bring collectors and trainer to the same version",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenWindow:
    """A window in the hands of one step, with all its pairs."""

    window_id: str
    entry_id: str
    pairs: WindowPairs
    lag: int | None
    """Optimizer steps between its oldest rollout's weights and the step; None without rollouts."""


class Inbox:
    def __init__(self, settings: Settings, connections: Connections, *, steps: Mapping[int, int], tally: Tally) -> None:
        """`steps`: weight version -> the step after which it was published (WeightPublisher.steps)."""
        self._settings, self._connections, self._tally = settings.trainer, connections, tally
        self._published = PublishedSteps(steps)
        self._reader = Reader(settings, connections)
        self._taken: list[TakenWindow] = []
        """Of a step that does not have all its pairs yet."""
        self._applied: dict[str, FinishedWindow] = {}
        self._dropped: Counter[str] = Counter()
        """Windows dropped since one was taken, by reason."""
        self._waiting_since: float | None = None

    def take(self, step: int, *, timeout_s: float = 1.0) -> list[TakenWindow] | None:
        """Whole windows for update `step`, until `pairs_per_step` pairs are there; fewer at the end of the source, then
        an empty list. None if they are not there within about `timeout_s`: what came is kept for the next call.

        Raises TrainingError when no window was taken for `trainer.stream_timeout_s`, or `trainer.max_dropped_windows`
        in a row were dropped; and what ended the reader: StreamError, DatabaseError or StreamSchemaError.
        """
        self._reader.start()
        deadline = time.monotonic() + timeout_s
        self._waiting_since = self._waiting_since or time.monotonic()
        while sum(len(window.pairs) for window in self._taken) < self._settings.pairs_per_step:
            arrival = self._reader.next(deadline - time.monotonic())
            if isinstance(arrival, Ended):
                break
            if arrival is not None:
                self._consider(arrival, step)
            self._refuse_to_wait_for_ever()
            if time.monotonic() >= deadline:
                return None
        taken, self._taken, self._waiting_since = self._taken, [], None
        return taken

    def mark_applied(self, windows: Sequence[TakenWindow], step: int) -> None:
        """Update `step` contains all their pairs."""
        for window in windows:
            self._applied[window.window_id] = FinishedWindow(
                entry_id=window.entry_id, step=step, num_pairs=len(window.pairs)
            )

    def drop_skipped(self, windows: Sequence[TakenWindow]) -> None:
        """Their step was skipped: nothing of them was applied, and no later step takes them."""
        for window in windows:
            self._drop(window.window_id, window.entry_id, NON_FINITE)

    def finished(self) -> dict[str, FinishedWindow]:
        """By id the windows applied since the last call, for the checkpoint that is about to be written."""
        finished, self._applied = self._applied, {}
        return finished

    def commit(self, finished: Mapping[str, FinishedWindow]) -> None:
        """A checkpoint that contains these windows is on disk: mark, acknowledge and forget them."""
        commit_finished(finished, self._connections)
        for window_id in finished:
            self._reader.forget(window_id)

    def close(self) -> None:
        """Stop reading ahead. Windows in hand that no checkpoint contains stay pending."""
        self._reader.close()

    def _consider(self, arrival: Arrival, step: int) -> None:
        if isinstance(arrival, BrokenEntry):
            self._drop_broken(arrival)
        elif isinstance(arrival, Duplicate):
            self._tally.counts["duplicate_windows"] += 1
            _log.info("window %s came again as entry %s", arrival.entry.window_id, arrival.entry.entry_id)
            self._acknowledge(arrival.entry.entry_id, arrival.entry.window_id)
        else:
            self._admit(arrival, step)

    def _admit(self, arrival: Prepared, step: int) -> None:
        window, pairs, lag = arrival.entry.window, arrival.selection.pairs, None
        if window.weight_versions:
            newest, published = max(window.weight_versions), self._published.newest_version
            if newest > published:  # rollouts of a policy that this run has not published
                detail = f"sampled under version {newest}, taken at version {published}"
                return self._refuse(arrival.entry, "newer_than_policy", detail)
            lag = self._published.lag(window.weight_versions, step=step)
            if lag > self._settings.max_policy_lag:
                self._tally.counts["stale_windows"] += 1
                return self._refuse(arrival.entry, "stale", f"its oldest rollout is {lag} steps behind update {step}")
        self._tally.add_window(window, arrival.selection)
        if not pairs:
            reason = _reason_without_pairs(arrival.selection)
            self._tally.counts[f"{reason}_windows"] += 1
            return self._refuse(arrival.entry, reason, _without_pairs(arrival))
        self._taken.append(TakenWindow(window.window_id, arrival.entry.entry_id, pairs, lag))
        self._dropped.clear()
        self._waiting_since = time.monotonic()
        return None

    def _refuse(self, entry: StreamEntry, reason: str, detail: str) -> None:
        self._drop(entry.window_id, entry.entry_id, reason, detail=detail, source_id=entry.window.source_id)
        self._count_dropped(reason)

    def _drop(self, window_id: str, entry_id: str, reason: str, *, detail: str = "", source_id: str = "") -> None:
        """The ledger first: after a crash in between, the redelivered entry is known as dropped."""
        key = WindowKey.parse(window_id)
        if self._connections.ledger.drop(key, reason=reason, detail=detail, source_id=source_id):
            metrics.windows_dropped_total.labels(reason).inc()
        self._acknowledge(entry_id, window_id)
        self._reader.forget(window_id)

    def _drop_broken(self, entry: BrokenEntry) -> None:
        """An entry whose window is known as finished, in hand, or by no readable id, is only acknowledged."""
        self._tally.counts["broken_windows"] += 1
        _log.error("entry %s (window %r) is broken: %s", entry.entry_id, entry.window_id, entry.reason)
        known = _is_key(entry.window_id) and not self._reader.has(entry.window_id)
        if known and not self._connections.ledger.finished_among([entry.window_id]):
            self._drop(entry.window_id, entry.entry_id, "broken_entry", detail=entry.reason)
        else:
            self._acknowledge(entry.entry_id, entry.window_id)
        self._count_dropped("broken_entry")

    def _acknowledge(self, entry_id: str, window_id: str) -> None:
        self._connections.stream.acknowledge({entry_id: window_id})

    def _count_dropped(self, reason: str) -> None:
        self._dropped[reason] += 1
        if self._dropped.total() >= self._settings.max_dropped_windows:
            raise TrainingError(
                f"{self._dropped.total()} windows in a row arrived only to be dropped (trainer.max_dropped_windows): "
                f"{self._reasons()}"
            )

    def _refuse_to_wait_for_ever(self) -> None:
        limit_s, since = self._settings.stream_timeout_s, self._waiting_since
        if not limit_s or since is None or self._reader.answered_at - since <= limit_s:
            return
        if self._dropped:
            raise TrainingError(
                f"no window that can be trained arrived for {limit_s:g} s (trainer.stream_timeout_s), "
                f"{self._dropped.total()} were dropped: {self._reasons()}"
            )
        raise TrainingError(
            f"no window arrived for {limit_s:g} s (trainer.stream_timeout_s): is a collector running, and are the "
            "services that it calls ready?"
        )

    def _reasons(self) -> str:
        """`31 stale, 2 no_preference; raise trainer.max_policy_lag, ...`: the remedy is for the most frequent."""
        counted = self._dropped.most_common()
        return f"{', '.join(f'{number} {reason}' for reason, number in counted)}; {_REMEDIES[counted[0][0]]}"


def commit_finished(finished: Mapping[str, FinishedWindow], connections: Connections) -> None:
    """The ledger first, then the stream. Repeating it, as after a crash in between, changes nothing."""
    steps = {window_id: window.step for window_id, window in finished.items()}
    num_pairs = {window_id: window.num_pairs for window_id, window in finished.items()}
    connections.ledger.mark_trained(steps, num_pairs=num_pairs)
    connections.stream.acknowledge({window.entry_id: window_id for window_id, window in finished.items()})


def _reason_without_pairs(selection: Selection) -> Literal["no_preference", "barred"]:
    return "barred" if selection.barred > selection.no_preference + selection.missing else "no_preference"


def _without_pairs(arrival: Prepared) -> str:
    window, selection = arrival.entry.window, arrival.selection
    return (
        f"{selection.no_preference} chunks without a preference, {selection.missing} without the needed candidates, "
        f"{selection.barred} without one that may be chosen, of {len(window.chunks) + len(window.dropped_chunks)}"
    )


def _is_key(window_id: str) -> bool:
    try:
        WindowKey.parse(window_id)
    except ValueError:
        return False
    return True
