"""One rank's part in publishing: a copy of its weights, gathered on rank 0 by a thread while the next step computes.

    sender.begin(model, step)      # training thread: waits for the version before, copies the weights, returns
    sender.wait()                  # until the thread is done; raises its error

Rank 0's sender goes on to publish what it has gathered (publisher.py).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist
from transformers import PreTrainedModel

from trainer.policy import DTYPES
from trainer.snapshot import Snapshot


@dataclass(kw_only=True)
class WeightSender:
    dtype: Literal["float32", "bfloat16"]
    """That replicas serve."""
    group: dist.ProcessGroup | None = None
    """Of all ranks, for this thread alone; None for a lone process."""
    offered_step: int = field(default=-1, init=False)
    """Of the newest copy; -1 before the first."""
    _snapshot: Snapshot = field(init=False)
    _thread: ThreadPoolExecutor = field(init=False)
    _job: Future[None] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._snapshot = Snapshot(self.group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")

    def begin(self, model: PreTrainedModel, step: int) -> None:
        """All ranks together, with the weights after `step`. Raises the error of the version before."""
        self.wait()
        self._snapshot.take(model, dtype=DTYPES[self.dtype])
        self.offered_step = step
        self._job = self._thread.submit(self._work, step)

    def wait(self) -> None:
        """Until the thread is idle: as long as rank 0 waits for store, database and Redis. Raises its error."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Waits for the version in the making."""
        self._thread.shutdown()

    def _work(self, step: int) -> None:
        """In the thread."""
        self._snapshot.gather()
