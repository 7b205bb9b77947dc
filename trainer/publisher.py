"""Publishes the policy's weights to the rollout service: store, row, announcement. The step does not wait for it.

    loop      is_due(step)? begin(model, step)       copies the weights (sender.py)
    thread    full, or changes since the version before -> files in the store, manifest last
              -> row in the database -> `steps` -> announcement -> older versions deleted

    publisher.continue_after(checkpoint_version)     # once, at the start
    publisher.publish(model, step)                   # and waits until it is announced

A version that is due while the thread is busy is not published: at the next boundary that finds the thread idle, the
then newest weights are.

Version numbers only ascend: after a resume the loaded weights get a number above all that the store, Redis, a live
replica or the checkpoint has seen. Where the store or Redis may have been wiped or restored, a new *epoch* begins:
replicas take its versions whatever their numbers.

A version is full if it is the first of the process, the `full_every`th, or no smaller as changes. The last published
bits stay in memory for comparison: 2 bytes a parameter in bfloat16, nothing in float32, where all versions are full.

An outage of the store is waited out like one of Redis. What waiting can't cure (no such folder, no right to write) is
raised at once.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from transformers import PreTrainedModel

from shared import metrics
from shared.coordination import AnnouncedWeights, Coordination
from shared.errors import DatabaseError, WeightStoreAwayError, WeightStoreError
from shared.retries import Retries
from shared.runs import Run
from shared.settings import WeightsSettings
from shared.weights.state import StateSums, Sums
from shared.weights.store import SPARSE_FILE, Manifest, WeightStore, file_names
from trainer.publication import Changes, PublishedBits, layouts_of, summed, write_full
from trainer.sender import WeightSender

_INCURABLE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(kw_only=True)
class WeightPublisher(WeightSender):
    """Rank 0's. The thread writes `version` and `steps`; the training thread calls all public methods."""

    store: WeightStore
    coordination: Coordination
    run: Run
    settings: WeightsSettings
    retries: Retries
    version: int = -1
    """The newest announced version; -1 before the first."""
    steps: dict[int, int] = field(default_factory=dict)
    """The step of each version of the run, known before it is announced."""
    epoch: str = ""
    """The lineage of version numbers; set by `continue_after`."""
    _published: PublishedBits | None = field(default=None, init=False)
    """To compare the next version with; None if that will be full."""
    _num_sparse: int = field(default=0, init=False)
    """Sparse versions since the last full one."""

    def is_due(self, step: int) -> bool:
        """Whether the weights after `step` should be published now: a version is due, and the thread is idle. Raises
        the thread's error."""
        if self._job is not None and not self._job.done():
            return False
        self.wait()
        return self.offered_step < step - step % self.settings.push_every

    def publish(self, model: PreTrainedModel, step: int) -> int:
        """Publish the weights after `step` and wait until they are announced; returns their version."""
        self.begin(model, step)
        self.wait()
        return self.version

    def continue_after(self, checkpoint_version: int) -> None:
        """The next version is above all that were ever seen; 0 if none were."""
        announced, stored = self.coordination.announced_weights(), self._with_store(self.store.versions)
        served = [version for version in self.coordination.live_replicas().values() if version]
        self.version = max(checkpoint_version, *stored, *served, announced.version if announced else -1)
        self.epoch = self._continued_epoch(announced, stored) or uuid.uuid4().hex
        _log.info("weight versions continue after %d in epoch %s", self.version, self.epoch)
        # A kill between manifest and row leaves a version that a replica may serve and `headwater audit` looks for.
        recorded = self.run.newest_weight_version()
        for version in stored:
            if recorded is not None and version > recorded:
                self._write_row(self._read_manifest(version), seconds=0.0)
        self.steps |= self.run.published_steps()

    def _continued_epoch(self, announced: AnnouncedWeights | None, stored: Sequence[int]) -> str:
        """The announced epoch if the store still has the announced version or a newer one of that epoch, else empty.
        Without an announcement a replica may have seen any number."""
        if announced is None or not stored or stored[-1] < announced.version:
            return ""
        try:
            newest = self._read_manifest(stored[-1])
        except WeightStoreAwayError:
            raise
        except WeightStoreError as exc:
            _log.warning("a new epoch of weight versions begins: %s", exc)
            return ""
        return announced.epoch if newest.epoch == announced.epoch else ""

    def _work(self, step: int) -> None:
        """After an error the next version is full."""
        super()._work(step)
        try:
            self._publish_next(step)
        except BaseException:
            self._published = None
            raise

    def _publish_next(self, step: int) -> None:
        began = time.perf_counter()
        manifest = self._write(self.version + 1, step)
        self._record(manifest, seconds=time.perf_counter() - began)
        self.steps[manifest.version] = step
        self.coordination.announce_weights(manifest.version, epoch=self.epoch)
        self.version = manifest.version
        self._prune()
        metrics.weight_push_seconds.observe(time.perf_counter() - began)
        metrics.weight_push_bytes_total.labels(manifest.form).inc(manifest.num_bytes)

    def _write(self, version: int, step: int) -> Manifest:
        """The changes since the last version where there is one, no full one is due, and they are smaller."""
        if self.dtype != "bfloat16" or self.settings.full_every == 1:
            return self._complete(version, lambda: self._write_full(version, step))
        if self._published is None:
            self._published = PublishedBits()
            self._published.hold(self._snapshot.tensors())
        elif self._num_sparse + 1 >= self.settings.full_every:
            self._published.hold(self._snapshot.tensors())
        elif changes := self._published.changes(self._snapshot.tensors()):
            self._num_sparse += 1
            return self._complete(version, lambda: self._write_changes(version, step, changes))
        self._num_sparse = 0
        return self._complete(version, lambda: self._write_full(version, step))

    def _write_full(self, version: int, step: int) -> Manifest:
        writer, layouts = self.store.begin(version, step=step, epoch=self.epoch), layouts_of(self._snapshot)
        if self._published is not None:
            write_full(writer, layouts, self._published.bits())
            sums = self._published.sums
        else:
            rows: dict[str, Sums] = {}
            write_full(writer, layouts, summed(self._snapshot.tensors(), rows))
            sums = StateSums(layouts, rows)
        return writer.finish(state_checksum=sums.checksum)

    def _write_changes(self, version: int, step: int, changes: Changes) -> Manifest:
        assert self._published is not None
        return self.store.publish(
            dict(zip(file_names(SPARSE_FILE, len(changes.pieces)), changes.pieces, strict=True)),
            version=version,
            step=step,
            epoch=self.epoch,
            base=self.version,
            state_checksum=self._published.sums.checksum,
            changed_checksum=changes.changed_checksum,
        )

    def _complete(self, version: int, write: Callable[[], Manifest]) -> Manifest:
        """Written as often as it takes. An earlier attempt whose answer was lost may have been the one."""
        num_attempts = 0

        def attempt() -> Manifest:
            nonlocal num_attempts
            num_attempts += 1
            if num_attempts > 1 and version in self.store.versions():
                earlier = self.store.manifest(version)
                if self.store.has_written(earlier):
                    return earlier
            return write()

        return self._with_store(attempt, doing=f"weight version {version} can't be written to")

    def _record(self, manifest: Manifest, seconds: float) -> None:
        """Deletes a version that can't be recorded: the next start publishes the same weights again, and every start
        would leave one more full version."""
        try:
            self._write_row(manifest, seconds)
        except DatabaseError:
            try:
                self.store.delete(manifest.version)
            except OSError as exc:
                _log.warning("version %d was not recorded, and stays in %s: %s", manifest.version, self.store.root, exc)
            raise

    def _write_row(self, manifest: Manifest, seconds: float) -> None:
        self.run.record_version(
            manifest.version,
            step=manifest.step,
            form=manifest.form,
            num_bytes=manifest.num_bytes,
            seconds=seconds,
            created_at=manifest.created_at,
        )

    def _prune(self) -> None:
        """A version that can't be deleted costs space, but must not end the run."""
        try:
            self.store.prune(keep=self.settings.keep_versions)
        except (OSError, WeightStoreError) as exc:
            _log.warning("old weight versions in %s can't be deleted: %s", self.store.root, exc)

    def _read_manifest(self, version: int) -> Manifest:
        return self._with_store(lambda: self.store.manifest(version))

    def _with_store(self, call: Callable[[], _T], *, doing: str = "can't read") -> _T:
        """Waits out an outage of the store."""

        def guarded() -> _T:
            with _away(self.store.root, doing):
                return call()

        return self.retries(guarded)


@dataclass(frozen=True)
class PublishedSteps:
    """Policy lag: how many optimizer steps old the weights are that a rollout was sampled from.

        published = PublishedSteps(publisher.steps)      # weight version -> step: {0: 0, 1: 1, 2: 1, 3: 2}
        published.lag([1, 3], step=4)                    # update 4 follows 3 completed steps: 3 - 1 = 2

    Versions can't be counted instead: a resumed trainer publishes the weights of an old step under a new number, and a
    slow publisher leaves steps out.
    """

    by_version: Mapping[int, int]
    """After which step each weight version was published. It grows while the publisher works, in another thread."""

    @property
    def newest_version(self) -> int:
        """At least 0, which is also the version of a replica that has loaded nothing yet."""
        return max((0, *self.by_version))

    def step_of(self, version: int) -> int:
        """Of a version that is not known, the step of the nearest lower one; 0 below all."""
        known = self.by_version.get(version)
        if known is not None:
            return known
        lower = [other for other in tuple(self.by_version) if other < version]
        return self.by_version[max(lower)] if lower else 0

    def lag(self, versions: Iterable[int], *, step: int) -> int:
        """Completed steps before update `step`, less the step of the oldest weights among `versions`.

        Never negative: after a resume from an earlier checkpoint, rollouts may come from weights of a later step.
        """
        oldest = min(self.step_of(version) for version in set(versions))
        return max(0, step - 1 - oldest)


@contextmanager
def _away(root: str, doing: str) -> Iterator[None]:
    """Says of an error of the file system whether waiting may cure it."""
    try:
        yield
    except OSError as exc:
        kind = WeightStoreError if isinstance(exc, _INCURABLE) else WeightStoreAwayError
        raise kind(f"{doing} {root}: {exc}; free space or mend weights.store, then start again") from exc
