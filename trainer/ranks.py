"""The processes of one trainer: torchrun's ranks, or a lone process. Built first, used by all that is shared.

    ranks = Ranks.join("auto")                     # from torchrun's environment
    plans = ranks.scatter(plans_by_rank)           # rank 0 gives one to each; the others pass None
    if ranks.any(stop.is_set()): ...               # decided for all together
    with ranks.guarding("the backward pass"): ...  # a dead peer: TrainingError "rank 1 of 3 is gone"

Control goes over gloo, the model's collectives over NCCL on CUDA. Publication and checkpoints, which gather in their
own threads, have a group each: two threads must not share one. A collective blocks until all ranks have called it, at
most `_WAIT_S`: the loop calls them at every step boundary and about once a second while it waits for windows.
A lone process opens nothing until FSDP2 or a checkpoint asks for a group, and then one in memory.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from shared.errors import HeadwaterError, SettingsError, TrainingError
from trainer.heartbeats import Heartbeats

GroupName = Literal["control", "publication", "checkpoint"]
_WAIT_S = 1800.0
"""Longer than rank 0 waits out an outage of Redis or the database (900 s)."""
_STEP_S = 600.0
"""For the model's own collectives: no rank waits for the outside between them."""
_JOIN_S = 600.0
_BROKEN = ("connection", "timed out", "timeout", "gloo", "nccl", "closed", "broken pipe", "socket")
"""Words in the errors of collectives; torch has no class of its own for those of gloo."""
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass
class Ranks:
    rank: int
    size: int
    device: torch.device
    _groups: dict[GroupName, dist.ProcessGroup] = field(default_factory=dict)
    _heartbeats: Heartbeats | None = None
    _mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, device: Literal["auto", "cpu", "cuda"], environment: Mapping[str, str] = os.environ) -> "Ranks":
        """Blocks until all ranks have come, at most ten minutes. Raises SettingsError or TrainingError."""
        place = _device(device, int(environment.get("LOCAL_RANK", "0")))
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
        ranks = cls(rank, size, place)
        if size > 1:
            ranks._connect(environment)
        return ranks

    @property
    def is_main(self) -> bool:
        """Rank 0: it alone has connections, files and sinks."""
        return self.rank == 0

    def _connect(self, environment: Mapping[str, str]) -> None:
        address = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_JOIN_S)))
            self._open(store)
            self._groups = {name: self._gloo() for name in ("control", "publication", "checkpoint")}
        except (RuntimeError, ValueError, dist.DistError) as exc:
            raise TrainingError(
                f"rank {self.rank} of {self.size} can't meet the others at {address}: {exc}; start all ranks by "
                "torchrun with one address"
            ) from exc
        self._heartbeats = Heartbeats(store, rank=self.rank, size=self.size)
        _log.info("rank %d of %d on %s", self.rank, self.size, self.device)

    def _open(self, store: Store) -> None:
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        wait = timedelta(seconds=_STEP_S)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=wait)

    def _gloo(self) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=_WAIT_S)))

    def group(self, name: GroupName) -> dist.ProcessGroup:
        """A gloo group; for a lone process one in memory, which never sends anything."""
        if self.size > 1:
            return self._groups[name]
        if not dist.is_initialized():
            self._open(HashStore())
        if name not in self._groups:
            self._groups[name] = self._gloo() if self.device.type == "cuda" else _world()
        return self._groups[name]

    @property
    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension, for FSDP2."""
        if self._mesh is None:
            self.group("control")
            self._mesh = init_device_mesh(self.device.type, (self.size,))
        return self._mesh

    def broadcast(self, value: _T | None) -> _T:
        """Rank 0's value, on every rank. Plain data only."""
        if self.size == 1:
            return cast(_T, value)
        box = [value if self.is_main else None]
        with self.guarding("a broadcast"):
            dist.broadcast_object_list(box, src=0, group=self._groups["control"])
        return cast(_T, box[0])

    def scatter(self, values: Sequence[_T] | None) -> _T:
        """Rank 0 gives value i to rank i; the others pass None."""
        if self.size == 1:
            assert values is not None
            return values[0]
        box: list[_T | None] = [None]
        given = list(values) if self.is_main and values is not None else None
        with self.guarding("a scatter"):
            dist.scatter_object_list(box, given, src=0, group=self._groups["control"])
        return cast(_T, box[0])

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor([float(flag)])).item())

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, the same bits on each, on the CPU. One call for all figures of a step, such as
        `ranks.sum(torch.stack([loss_sum, num_pairs]))`."""
        total = tensor.detach().to("cpu", copy=True)
        if self.size > 1:
            with self.guarding("a sum"):
                dist.all_reduce(total, group=self._groups["control"])
        return total

    def on_main(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on rank 0, on every rank; its error ends every rank with the same sentence."""
        if self.size == 1:
            return work()
        answer: tuple[_T | None, HeadwaterError | None] = (None, None)
        if self.is_main:
            try:
                answer = (work(), None)
            except HeadwaterError as exc:
                answer = (None, exc)
        value, error = self.broadcast(answer)
        if error is not None:
            raise error
        return cast(_T, value)

    def only_on_main(self, work: Callable[[], _T]) -> _T | None:
        """The same, but what `work` returns stays on rank 0: None elsewhere."""
        kept: list[_T] = []
        self.on_main(lambda: kept.append(work()))
        return kept[0] if kept else None

    @contextmanager
    def guarding(self, what: str) -> Iterator[None]:
        """Raises TrainingError with the rank that is gone where a collective in the block fails."""
        try:
            yield
        except (RuntimeError, dist.DistError) as exc:
            if self.size == 1 or not _is_broken(exc):
                raise
            gone = self._heartbeats.gone() if self._heartbeats else []
            raise TrainingError(_farewell(gone, self.size, what)) from exc

    def leave(self) -> None:
        """Close all groups; to be called once on a good end. A rank that ends by an error just ends."""
        if self._heartbeats is not None:
            self._heartbeats.leave()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"trainer.device is cuda, but this machine shows {torch.cuda.device_count()} GPUs and rank {local_rank} on "
            "it needs one more: give torchrun a smaller --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _is_broken(exc: BaseException) -> bool:
    return isinstance(exc, dist.DistError) or any(word in str(exc).lower() for word in _BROKEN)


def _farewell(gone: Sequence[int], size: int, what: str) -> str:
    who = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))} of {size} {'are' if len(gone) > 1 else 'is'}"
    who = f"{who} gone" if gone else f"a connection between the {size} ranks broke"
    return f"{who}: {what} can't be finished; its own log says why, start all ranks again from the last checkpoint"
