"""Sends the policy's weights to the rollout service: store, announcement, row. Called by the loop.

    state_dict -> safetensors bytes in the dtype that replicas serve -> full, or changes against the version before
               -> WeightStore.publish (manifest last) -> row in the database -> announce

Versions only ascend: after a resume from an older checkpoint the loaded weights get a new number, above everything
that the store, Redis, a living replica or the checkpoint has seen. Where the trainer can't know what was seen, because
the store or Redis was wiped or restored, it begins a new *epoch*: replicas take its versions whatever their numbers.

The first version of a process is full, then every `full_every`th, and any that would not be smaller as changes. What
was published last stays in memory to be compared with: 2 bytes a parameter in bfloat16, nothing in float32, where every
element changes at every step and no version is sparse.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shared import metrics
from shared.coordination import AnnouncedWeights, Coordination
from shared.errors import DatabaseError, WeightStoreError
from shared.runs import Run
from shared.weights.patches import encode_patches, find_patches, foresee
from shared.weights.state import State, StateSums, lay_out, parse_state
from shared.weights.store import FULL_FILE, SPARSE_FILE, Manifest, WeightStore
from trainer.patience import Patience

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Of what a state may hold once its floating tensors are rounded, as safetensors names it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Published:
    """The newest version, as replicas have it."""

    version: int
    state: State
    sums: StateSums
    num_sparse: int
    """Sparse versions since the last full one, this one included."""


@dataclass(frozen=True)
class _Update:
    """What is to be written: one file."""

    name: str
    content: bytes | bytearray
    state: State
    sums: StateSums
    base: int | None = None
    changed_checksum: str = ""


@dataclass
class WeightPublisher:
    store: WeightStore
    coordination: Coordination
    run: Run
    dtype: Literal["float32", "bfloat16"]
    full_every: int
    keep_versions: int
    patience: Patience
    version: int = -1
    """The newest published version; -1 before the first."""
    epoch: str = ""
    """What its number belongs to; `continue_after` decides it."""
    _last: _Published | None = field(default=None, init=False)

    def continue_after(self, checkpoint_version: int) -> None:
        """The next version is above all that anybody has seen; 0 where nobody has seen any."""
        announced = self.patience(self.coordination.announced_weights)
        stored = self.store.versions()
        served = [version for version in self.patience(self.coordination.live_replicas).values() if version]
        seen = [checkpoint_version, *stored, *served, *([announced.version] if announced else [])]
        self.version = max(seen)
        self.epoch = self._epoch_that_goes_on(announced, stored) or uuid.uuid4().hex
        _log.info("weight versions go on after %d in epoch %s", self.version, self.epoch)
        self._record_forgotten(stored)

    def _epoch_that_goes_on(self, announced: AnnouncedWeights | None, stored: Sequence[int]) -> str:
        """That of the announcement, if the store still has the announced version or a newer one of its epoch; else
        empty. (Without an announcement a replica may have seen any number.)"""
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
        version = self.version + 1
        update = self._prepare(weight_bytes(model, _DTYPES[self.dtype]))
        manifest = self._write(update, version, step)
        seconds = time.perf_counter() - began
        self._record(manifest, seconds)
        self.patience(lambda: self.coordination.announce_weights(version, epoch=self.epoch))
        self.version = version
        self._remember(update)
        self._prune()
        metrics.weight_push_seconds.observe(time.perf_counter() - began)
        metrics.weight_push_bytes_total.labels(manifest.form).inc(manifest.num_bytes)
        return version

    def _prepare(self, content: bytearray) -> _Update:
        """The changes since the last version, if there is one, if a full one isn't due, and if they are smaller."""
        state = parse_state(content, where="the policy")
        last = self._last
        if last is None or last.num_sparse + 1 >= self.full_every:
            return _Update(FULL_FILE, content, state, StateSums.of(state))
        patches = find_patches(last.state, state)
        sums, changed_checksum = foresee(last.sums, patches, last.state)
        changes = encode_patches(patches, last.state)
        if len(changes) >= len(content):
            return _Update(FULL_FILE, content, state, sums)
        return _Update(SPARSE_FILE, changes, state, sums, base=last.version, changed_checksum=changed_checksum)

    def _write(self, update: _Update, version: int, step: int) -> Manifest:
        try:
            return self.store.publish(
                {update.name: update.content},
                version=version,
                step=step,
                epoch=self.epoch,
                base=update.base,
                state_checksum=update.sums.checksum,
                changed_checksum=update.changed_checksum,
            )
        except OSError as exc:
            # without a manifest the version does not exist; the next start writes over its folder
            raise WeightStoreError(
                f"weight version {version} ({len(update.content)} bytes) can't be written to {self.store.root}: {exc}; "
                "free space or mend weights.store, then start again"
            ) from exc

    def _remember(self, update: _Update) -> None:
        """Only where a next version may be compared with it."""
        if self.dtype == "bfloat16" and self.full_every > 1:
            num_sparse = 0 if update.base is None or self._last is None else self._last.num_sparse + 1
            self._last = _Published(self.version, update.state, update.sums, num_sparse)

    def _record(self, manifest: Manifest, seconds: float) -> None:
        """A version that can't be recorded is taken back: nobody was told of it, and the next start publishes the same
        weights again. Without this each start would leave one more full version."""
        try:
            self.patience(lambda: self._write_row(manifest, seconds))
        except DatabaseError:
            self._delete_quietly(manifest.version)
            raise

    def _record_forgotten(self, present: Sequence[int]) -> None:
        """A kill came between a version's manifest and its row. A replica may serve it all the same, so its number is
        used up, and `headwater audit` looks for its row."""
        recorded = self.patience(self.run.newest_weight_version)
        for version in present:
            if recorded is not None and version > recorded:
                manifest = self.store.manifest(version)
                self.patience(lambda manifest=manifest: self._write_row(manifest, seconds=0.0))  # type: ignore[misc]

    def _write_row(self, manifest: Manifest, seconds: float) -> None:
        self.run.record_version(
            manifest.version,
            step=manifest.step,
            form=manifest.form,
            num_bytes=manifest.num_bytes,
            seconds=seconds,
            created_at=manifest.created_at,
        )

    def _delete_quietly(self, version: int) -> None:
        try:
            self.store.delete(version)
        except OSError as exc:
            _log.warning(
                "weight version %d, which could not be recorded, stays in %s: %s", version, self.store.root, exc
            )

    def _prune(self) -> None:
        """A version that can't be deleted costs space, not the run."""
        try:
            self.store.prune(keep=self.keep_versions)
        except (OSError, WeightStoreError) as exc:
            _log.warning("old weight versions in %s can't be deleted: %s", self.store.root, exc)


def weight_bytes(model: PreTrainedModel, dtype: torch.dtype) -> bytearray:
    """The state as one safetensors file, floating tensors as `dtype`; of tied weights only the first name is kept, as
    `save_pretrained` does. Each tensor is rounded and copied, off its device too, in one pass."""
    state = untied_state(model)
    dtypes = {name: dtype if tensor.is_floating_point() else tensor.dtype for name, tensor in state.items()}
    layout = lay_out(
        {name: (_DTYPE_NAMES[dtypes[name]], tuple(tensor.shape)) for name, tensor in state.items()}, {"format": "pt"}
    )
    content = bytearray(layout.num_bytes)
    content[: len(layout.header)] = layout.header
    for name, offset in layout.offsets.items():
        if count := state[name].numel():
            place = torch.frombuffer(content, dtype=dtypes[name], count=count, offset=offset)
            place.view(state[name].shape).copy_(state[name])
    return content


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> tensor without names that share storage with an earlier one."""
    seen: set[tuple[int, torch.Size]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen.add(place)
            state[name] = tensor
    return state
