"""A copy of the policy's weights in CPU memory, taken between two steps and read by a thread while the next one runs.

    snapshot = Snapshot()
    snapshot.take(model, dtype=torch.bfloat16)       # training thread: one copy, rounded on the model's device
    for name, tensor in snapshot.tensors(): ...      # background thread: the checkpoint's own names, one by one

Its memory is reused by the next `take`, so whoever reads it must have finished by then (sender.py, checkpoint.py).
Of a sharded model every rank copies its own shards; `tensors` gathers them on rank 0 one by one, so all ranks go
through it, each with a gloo group that no other thread uses: `Snapshot(ranks.group("publication"))`.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shared.weights.checkpoint_names import NameGroup, checkpoint_layouts, name_groups, rounded, untied_state
from trainer.sharding import local


class Snapshot:
    """Of one model, at one dtype: what belongs to them is made by the first `take`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        self._model: PreTrainedModel | None = None
        self._name_groups: list[NameGroup] = []
        self._shards: dict[str, Tensor] = {}
        """By the name in memory: this process's part of the tensor."""
        self._shapes: dict[str, torch.Size] = {}
        """By the name in memory, of the whole tensors that lie on several ranks, split in their first dimension."""
        self._wholes: dict[str, Tensor] = {}
        """By the name in memory, on rank 0 after `gather`."""
        self.layouts: dict[str, tuple[torch.dtype, torch.Size]] = {}
        """Of the tensors that `tensors` yields, in the same order."""

    @torch.no_grad()
    def take(self, model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> None:
        """Copy the weights as they are now; floating tensors are rounded to `dtype`. Done when it returns."""
        if model is not self._model:
            self._model, self._name_groups, self._shards = model, name_groups(model), {}
            self.layouts = checkpoint_layouts(model, dtype)
        self._wholes, device = {}, model.device
        for name, tensor in untied_state(model).items():
            shard = local(tensor)
            into = rounded(shard, dtype)
            if name not in self._shards:
                if self._group is not None and isinstance(tensor, DTensor):
                    self._shapes[name] = tensor.shape
                self._shards[name] = torch.empty(shard.shape, dtype=into, pin_memory=device.type == "cuda")
            source = shard.to(into) if device.type != "cpu" else shard  # halves what crosses the bus
            self._shards[name].copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def gather(self) -> None:
        """All ranks: bring the whole tensors to rank 0, which can then go through `tensors` alone, more than once."""
        for name in self._shapes:
            whole = self._whole(name)
            if self._group is not None and self._group.rank() == 0:
                self._wholes[name] = whole

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(the checkpoint's own name, whole tensor) on the CPU; of a converted group all tensors exist at once. May be
        called again. They are valid until the next `take`. Other ranks than 0 join the gather and yield nothing."""
        assert self._model is not None, "take() comes first"
        for group in self._name_groups:
            wholes = {name: self._whole(name) for name in group.names}
            if self._group is None or self._group.rank() == 0:
                yield from group.to_checkpoint(self._model, wholes)

    def _whole(self, name: str) -> Tensor:
        """The whole tensor of a name in memory; on other ranks than 0 of a sharded model only this rank's part."""
        if name in self._wholes:
            return self._wholes[name]
        if self._group is None or name not in self._shapes:
            return self._shards[name]
        return _gather(self._shards[name], self._shapes[name], self._group)


def _gather(shard: Tensor, shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """Whole on rank 0. FSDP2 splits the first dimension into equal parts, of which the last may be short or empty; they
    travel as bytes, since gloo does not know every dtype."""
    size, is_main = group.size(), group.rank() == 0
    length = -(-shape[0] // size)
    part = shard.new_zeros((length, *shape[1:]))
    part[: shard.shape[0]] = shard
    parts = torch.empty((size * length, *shape[1:]), dtype=shard.dtype) if is_main else None
    sent = part.flatten().view(torch.uint8)
    into = list(parts.flatten().view(torch.uint8).chunk(size)) if parts is not None else None
    dist.gather(sent, into, dst=0, group=group)
    return parts[: shape[0]] if parts is not None else shard
