"""A copy of the policy's weights in CPU memory, taken between two steps and read by a thread while the next one runs.

    snapshot = Snapshot()
    snapshot.take(model, dtype=torch.bfloat16)       # training thread: one copy, rounded on the model's device
    for name, tensor in snapshot.tensors(): ...      # background thread: the checkpoint's own names, one by one

Its memory is reused by the next `take`, so whoever reads it must have finished by then (publisher.py, checkpoint.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shared.weights.checkpoint_names import NameGroup, checkpoint_layouts, name_groups, rounded, untied_state


class Snapshot:
    """Of one model: always the same one."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._groups: list[NameGroup] = []
        self._shards: dict[str, Tensor] = {}
        """By the name in memory: this process's part of the tensor."""
        self.layouts: dict[str, tuple[torch.dtype, torch.Size]] = {}
        """Of the tensors that `tensors` yields, in the same order."""

    @torch.no_grad()
    def take(self, model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> None:
        """Copy the weights as they are now; floating tensors are rounded to `dtype`. Done when it returns."""
        if self._model is None:
            self._model, self._groups = model, name_groups(model)
            self.layouts = checkpoint_layouts(model, dtype)
        assert model is self._model, "a snapshot is made for one model"
        device = model.device
        for name, tensor in untied_state(model).items():
            shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            into = rounded(shard, dtype)
            if name not in self._shards:
                self._shards[name] = torch.empty(shard.shape, dtype=into, pin_memory=device.type == "cuda")
            source = shard.to(into) if device.type != "cpu" else shard  # halves what crosses the bus
            self._shards[name].copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(the checkpoint's own name, whole tensor) on the CPU; of a converted group all tensors exist at once. May be
        called again. They are valid until the next `take`."""
        assert self._model is not None, "take() comes first"
        for group in self._groups:
            yield from group.to_checkpoint(self._model, {name: self._whole(name) for name in group.names})

    def _whole(self, name: str) -> Tensor:
        """The whole tensor of a name in memory."""
        return self._shards[name]
