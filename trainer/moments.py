"""The optimizer's moments and the random state, to and from torch.distributed.checkpoint. Used by checkpoint.py.

    moments = Moments.take(optimizer, ranks)      # training thread: this rank's shards, copied to memory
    moments.write(folder, ranks)                  # background thread: each rank writes its own
    read_moments(folder, optimizer, ranks)        # on any number of ranks: each reads what it needs

A moment is saved as a tensor of the whole model, in the pieces that the ranks hold.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.optimizer import PolicyOptimizer
from trainer.ranks import Ranks

_CPU, _CUDA = "random.cpu", "random.cuda"


@dataclass(frozen=True)
class Moments:
    tensors: dict[str, Tensor]

    @classmethod
    def take(cls, optimizer: PolicyOptimizer, ranks: Ranks) -> "Moments":
        """On the CPU, and with rank 0's random state."""
        mesh = DeviceMesh.from_group(ranks.group("checkpoint"), "cpu")
        tensors = {name: _copied(tensor, mesh) for name, tensor in optimizer.state().items()}
        if ranks.is_main:
            tensors[_CPU] = torch.get_rng_state()
            if ranks.device.type == "cuda":
                tensors[_CUDA] = torch.cuda.get_rng_state()
        return cls(tensors)

    def write(self, folder: Path, ranks: Ranks) -> None:
        """Raises OSError or CheckpointException on every rank."""
        writer = FileSystemWriter(folder)
        save(dict(self.tensors), storage_writer=writer, process_group=ranks.group("checkpoint"))


def read_moments(folder: Path, optimizer: PolicyOptimizer, ranks: Ranks) -> None:
    """Parameters that never had a gradient have no moments, and get none."""
    found = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    tensors = optimizer.empty_state(found - {_CPU, _CUDA})
    random: dict[str, Tensor] = {_CPU: torch.get_rng_state()}
    if ranks.device.type == "cuda" and _CUDA in found:
        random[_CUDA] = torch.cuda.get_rng_state()
    reader = FileSystemReader(folder)
    load({**tensors, **random}, storage_reader=reader, process_group=ranks.group("checkpoint"))
    optimizer.load_state(tensors)
    torch.set_rng_state(random[_CPU])
    if _CUDA in random:
        torch.cuda.set_rng_state(random[_CUDA])


def _copied(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    shard = tensor.to_local().detach().to("cpu", copy=True)
    placed = DTensor.from_local(
        shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    assert isinstance(placed, DTensor)
    return placed
