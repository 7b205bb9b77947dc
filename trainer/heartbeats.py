"""Which rank is gone? Every rank counts up its own beat in torchrun's store; one whose beat stands still is gone.

    beats = Heartbeats(store, rank=0, size=3)      # starts a daemon thread
    beats.gone()                                   # [1], after watching for three seconds

A collective that fails says only that some connection broke, and the ranks that find out first end and break further
connections. So the first verdict is kept in the store, and all others repeat it.
"""

import threading
import time

import torch.distributed as dist
from torch._C._distributed_c10d import Store

_BEAT_S = 0.5
_WATCH_S = 3.0
_VERDICT = "gone"


class Heartbeats:
    def __init__(self, store: Store, *, rank: int, size: int) -> None:
        self._store = store
        self._rank, self._size = rank, size
        self._beating: Store = store.clone()  # type: ignore[attr-defined]  # a store serves one thread at a time
        self._left = threading.Event()
        threading.Thread(target=self._beat, name="heartbeats", daemon=True).start()

    def _beat(self) -> None:
        number = 0
        while not self._left.is_set():
            number += 1
            try:
                self._beating.set(f"beat/{self._rank}", str(number))
            except (RuntimeError, dist.DistError):  # the store is gone: `gone` finds out
                return
            self._left.wait(_BEAT_S)

    def leave(self) -> None:
        self._left.set()

    def gone(self) -> list[int]:
        """Ranks without a sign of life for three seconds; rank 0 if the store itself is gone; perhaps none."""
        try:
            before = self._look()
            until = time.monotonic() + _WATCH_S
            while time.monotonic() < until:
                if self._store.check([_VERDICT]):
                    break
                time.sleep(_BEAT_S)
            after = self._look()
            found = [rank for rank in range(self._size) if rank != self._rank and before[rank] == after[rank]]
            verdict = self._store.compare_set(_VERDICT, "", ",".join(map(str, found)))
        except (RuntimeError, dist.DistError):
            return [0] if self._rank else []
        return [int(rank) for rank in verdict.decode().split(",") if rank]

    def _look(self) -> list[str]:
        return [self._read(f"beat/{rank}") for rank in range(self._size)]

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""
