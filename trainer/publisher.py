"""Publishes the policy's weights to the rollout service: store, row, announcement. Called by the loop.

    state_dict -> safetensors bytes in the dtype that replicas serve -> full, or changes since the version before
               -> WeightStore.publish (manifest last) -> row in the database -> announcement

    publisher.continue_after(checkpoint_version)     # once, at the start
    version = publisher.publish(model, step)

Version numbers only ascend: after a resume the loaded weights get a number above all that the store, Redis, a live
replica or the checkpoint has seen. Where the store or Redis may have been wiped or restored, a new *epoch* begins:
replicas take its versions whatever their numbers.

A version is full if it is the first of the process, the `full_every`th, or no smaller as changes. The last published
bits stay in memory for comparison: 2 bytes a parameter in bfloat16, nothing in float32, where all versions are full.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared import metrics
from shared.coordination import AnnouncedWeights, Coordination
from shared.errors import DatabaseError, WeightStoreError
from shared.runs import Run
from shared.settings import WeightsSettings
from shared.weights.patches import encode_patches, find_patches, foresee
from shared.weights.state import State, StateSums, lay_out, parse_state
from shared.weights.store import FULL_FILE, SPARSE_FILE, Manifest, WeightStore
from trainer.policy import DTYPES

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPE_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
"""What safetensors calls the dtypes of a state whose floating tensors are rounded."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Update:
    """One version and its one file."""

    version: int
    name: str
    content: bytes | bytearray
    state: State
    """Bit for bit as replicas have it."""
    sums: StateSums
    base: int | None = None
    changed_checksum: str = ""
    num_sparse: int = 0
    """Sparse versions since the last full one, this one included."""


@dataclass
class WeightPublisher:
    store: WeightStore
    coordination: Coordination
    run: Run
    settings: WeightsSettings
    dtype: Literal["float32", "bfloat16"]
    version: int = -1
    """The newest published version; -1 before the first."""
    epoch: str = ""
    """The lineage of version numbers; set by `continue_after`."""
    steps: dict[int, int] = field(default_factory=dict, init=False)
    """Weight version -> the step after which it was published. A version is in it before it is announced."""
    last: _Update | None = field(default=None, init=False)
    """To compare the next version with; None if that will be full."""

    def continue_after(self, checkpoint_version: int) -> None:
        """The next version is above all that were ever seen; 0 if none were."""
        announced, stored = self.coordination.announced_weights(), self.store.versions()
        served = [version for version in self.coordination.live_replicas().values() if version]
        self.version = max(checkpoint_version, *stored, *served, announced.version if announced else -1)
        self.epoch = self._continued_epoch(announced, stored) or uuid.uuid4().hex
        _log.info("weight versions continue after %d in epoch %s", self.version, self.epoch)
        # A kill between manifest and row leaves a version that a replica may serve and `headwater audit` looks for.
        recorded = self.run.newest_weight_version()
        for version in stored:
            if recorded is not None and version > recorded:
                self._write_row(self.store.manifest(version), seconds=0.0)
        self.steps.update(self.run.published_steps())

    def _continued_epoch(self, announced: AnnouncedWeights | None, stored: Sequence[int]) -> str:
        """The announced epoch if the store still has the announced version or a newer one of that epoch, else empty.
        Without an announcement a replica may have seen any number."""
        if announced is None or not stored or stored[-1] < announced.version:
            return ""
        try:
            newest = self.store.manifest(stored[-1])
        except WeightStoreError as exc:
            _log.warning("a new epoch of weight versions begins: %s", exc)
            return ""
        return announced.epoch if newest.epoch == announced.epoch else ""

    def publish(self, model: PreTrainedModel, step: int) -> int:
        """Write, record and announce the weights after `step`; returns their version. Raises WeightStoreError."""
        began = time.perf_counter()
        update = self._prepare(weight_bytes(model, DTYPES[self.dtype]))
        manifest = self._write(update, step)
        self._record(manifest, seconds=time.perf_counter() - began)
        self.steps[update.version] = step
        self.coordination.announce_weights(update.version, epoch=self.epoch)
        self.version = update.version
        if self.dtype == "bfloat16" and self.settings.full_every > 1:  # otherwise all versions are full
            self.last = replace(update, content=b"")
        self._prune()
        metrics.weight_push_seconds.observe(time.perf_counter() - began)
        metrics.weight_push_bytes_total.labels(manifest.form).inc(manifest.num_bytes)
        return update.version

    def _prepare(self, content: bytearray) -> _Update:
        """The changes since the last version where there is one, no full one is due, and they are smaller."""
        state, last, version = parse_state(content, where="the policy"), self.last, self.version + 1
        if last is None or last.num_sparse + 1 >= self.settings.full_every:
            return _Update(version, FULL_FILE, content, state, StateSums.of(state))
        patches = find_patches(last.state, state)
        sums, changed_checksum = foresee(last.sums, patches, last.state)
        changes = encode_patches(patches, last.state)
        if len(changes) >= len(content):
            return _Update(version, FULL_FILE, content, state, sums)
        return _Update(version, SPARSE_FILE, changes, state, sums, last.version, changed_checksum, last.num_sparse + 1)

    def _write(self, update: _Update, step: int) -> Manifest:
        try:
            return self.store.publish(
                {update.name: update.content},
                version=update.version,
                step=step,
                epoch=self.epoch,
                base=update.base,
                state_checksum=update.sums.checksum,
                changed_checksum=update.changed_checksum,
            )
        except OSError as exc:
            # without a manifest the version does not exist; the next start overwrites its folder
            raise WeightStoreError(
                f"weight version {update.version} ({len(update.content)} bytes) can't be written to {self.store.root}: "
                f"{exc}; free space or mend weights.store, then start again"
            ) from exc

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


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> bytearray:
    """The state as one safetensors file: floating tensors rounded to `dtype`, tied weights once."""
    state = untied_state(model)
    dtypes = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    shapes = {name: (_DTYPE_NAMES[dtypes[name]], tuple(tensor.shape)) for name, tensor in state.items()}
    layout = lay_out(shapes, {"format": "pt"})
    content = bytearray(layout.num_bytes)
    content[: len(layout.header)] = layout.header
    for name, offset in layout.offsets.items():
        if count := state[name].numel():
            place = torch.frombuffer(content, dtype=dtypes[name], count=count, offset=offset)
            place.view(state[name].shape).copy_(state[name])
    return content


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> tensor. Of tied weights only the first name is kept, as `save_pretrained` does."""
    first: dict[tuple[int, torch.Size], str] = {}
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        first.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: tensors[name] for name in first.values()}
