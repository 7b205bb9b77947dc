"""The trainer's view of the rollout replicas, and its wait for those that lag. Called by lead.py.

A replica is alive until its heartbeat in Redis expires. By default the trainer waits for none: a late replica costs
only its own rollouts, which are dropped as stale. Waiting pays where rollouts cost more than steps.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event

from shared import metrics
from shared.coordination import Coordination
from shared.runs import Run
from trainer.publisher import PublishedSteps

_log = logging.getLogger(__name__)
_POLL_S = 0.05


@dataclass
class Replicas:
    coordination: Coordination
    run: Run
    published: PublishedSteps
    max_lag: int
    """Optimizer steps."""
    max_wait_s: float
    """0: look, never wait."""
    stop: Event
    _known: Mapping[str, int] = field(default_factory=dict, init=False)
    _given_up: dict[str, int] = field(default_factory=dict, init=False)
    """Replicas that did not catch up in time, with the version they had. They are waited for again once it changes."""

    def keep_up(self, step: int) -> None:
        """Wait, at most `max_wait_s`, while a live replica serves weights more than `max_lag` steps older than those
        after `step`, or a version that was never published (of another epoch)."""
        waited_for = late = self._late(self._look(), step)
        if not late or not self.max_wait_s:
            return
        _log.info("waiting for replicas %s to catch up with step %d", sorted(late), step)
        began = time.monotonic()
        while late and time.monotonic() - began < self.max_wait_s and not self.stop.wait(_POLL_S):
            late = self._late(self._look(), step)
        self._conclude(waited_for, late, step, time.monotonic() - began)

    def _look(self) -> Mapping[str, int]:
        live = self.coordination.live_replicas()
        for replica in self._known.keys() - live.keys():
            _log.warning("replica %s is gone, it served version %d", replica, self._known[replica])
            metrics.replica_version.remove(replica)
        for replica, version in live.items():
            metrics.replica_version.labels(replica).set(version)
        metrics.live_replicas.set(len(live))
        self._known = live
        return live

    def _late(self, live: Mapping[str, int], step: int) -> dict[str, int]:
        return {
            replica: served
            for replica, served in live.items()
            if self._is_far(served, step) and self._given_up.get(replica) != served
        }

    def _is_far(self, served: int, step: int) -> bool:
        is_unknown = served > self.published.newest_version
        return is_unknown or step - self.published.step_of(served) > self.max_lag

    def _conclude(self, waited_for: Mapping[str, int], late: Mapping[str, int], step: int, seconds: float) -> None:
        if not late or self.stop.is_set():
            metrics.replica_waits_total.labels("caught_up" if not late else "stopped").inc()
            _log.info("replicas %s caught up or died after %.1f s", sorted(waited_for), seconds)
            return
        metrics.replica_waits_total.labels("given_up").inc()
        self._given_up.update(late)
        message = (
            f"replicas with versions {dict(sorted(late.items()))} are not within {self.max_lag} steps of step {step} "
            f"after {seconds:.1f} s (trainer.replica_wait_s): training continues, their rollouts will be dropped; "
            "their /status says what is wrong"
        )
        _log.warning(message)
        self.run.record_event("trainer", "late_replicas", message, replicas=dict(late))
