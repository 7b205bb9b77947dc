"""Sends the policy's weights to the rollout service: store, announcement, row. Called by the loop.

    state_dict -> safetensors bytes -> WeightStore.publish (manifest last) -> WeightVersionRow -> announce

Versions only ascend: after a resume from an older checkpoint the loaded weights get a new number, above everything
that the store, Redis or the checkpoint has seen.
"""

import logging
import time
from dataclasses import dataclass

import safetensors.torch
import torch
from sqlalchemy import Engine
from torch import Tensor
from transformers import PreTrainedModel

from shared import metrics
from shared.coordination import Coordination
from shared.database import WeightVersionRow, transaction
from shared.errors import WeightStoreError
from shared.weight_store import Manifest, WeightStore
from trainer.patience import Patience

WEIGHTS_FILE = "model.safetensors"
_log = logging.getLogger(__name__)


@dataclass
class WeightPublisher:
    store: WeightStore
    coordination: Coordination
    engine: Engine
    run_id: str
    keep_versions: int
    patience: Patience
    version: int = -1
    """The newest published version; -1 before the first."""

    def continue_after(self, checkpoint_version: int) -> None:
        """The next version is above all that anybody has seen; 0 where nobody has seen any."""
        announced = self.patience(self.coordination.announced_version)
        seen = [checkpoint_version, *self.store.versions(), *([] if announced is None else [announced])]
        self.version = max(seen)

    def publish(self, model: PreTrainedModel, step: int) -> int:
        """Write, record and announce the weights after `step`; returns their version. Raises WeightStoreError."""
        began = time.perf_counter()
        version = self.version + 1
        manifest = self._write(weight_bytes(model), version, step)
        seconds = time.perf_counter() - began
        self.patience(lambda: self._record(manifest, seconds))
        self.patience(lambda: self.coordination.announce_weights(version))
        self.version = version
        self._prune()
        metrics.weight_push_seconds.observe(time.perf_counter() - began)
        return version

    def _write(self, content: bytes, version: int, step: int) -> Manifest:
        try:
            return self.store.publish({WEIGHTS_FILE: content}, version=version, step=step)
        except OSError as exc:
            # without a manifest the version does not exist; the next start writes over its folder
            raise WeightStoreError(
                f"weight version {version} ({len(content)} bytes) can't be written to {self.store.root}: {exc}; "
                "free space or mend weights.store, then start again"
            ) from exc

    def _record(self, manifest: Manifest, seconds: float) -> None:
        row = WeightVersionRow(
            run_id=self.run_id,
            version=manifest.version,
            step=manifest.step,
            form=manifest.form,
            num_bytes=manifest.num_bytes,
            seconds=seconds,
            created_at=manifest.created_at,
        )
        with transaction(self.engine) as session:
            session.merge(row)

    def _prune(self) -> None:
        """A version that can't be deleted costs space, not the run."""
        try:
            self.store.prune(keep=self.keep_versions)
        except OSError as exc:
            _log.warning("old weight versions in %s can't be deleted: %s", self.store.root, exc)


def weight_bytes(model: PreTrainedModel) -> bytes:
    """The state as one safetensors file; of tied weights only the first name is kept, as `save_pretrained` does."""
    return safetensors.torch.save(untied_state(model), metadata={"format": "pt"})


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> tensor without names that share storage with an earlier one."""
    seen: set[tuple[int, torch.Size]] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:
            seen.add(place)
            state[name] = tensor.contiguous()
    return state
