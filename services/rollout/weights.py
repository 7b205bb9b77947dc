"""The weight watcher: brings announced weight versions from the store into the engine. One thread of its own.

    announced (Redis) --poll--> fetch, compare checksums, patch the own copy (weight_copy.py), the engine generates on
                      --------> engine.patch_weights, where it can, or engine.load_weights --> version served

Whatever fails before the engine has switched leaves the last good version in service: it is counted, logged, written
as an event and shown in /status, and tried again with backoff or when a newer version is announced.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from services.engine.base import Engine, PatchableEngine
from services.rollout.weight_copy import Staged, WeightCopy
from shared import metrics
from shared.errors import EngineError, HeadwaterError, StreamError, WeightStoreError
from shared.weight_store import WeightStore

_log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
_FIRST_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_STOP_S = 5.0


class Events(Protocol):
    def record(self, kind: str, message: str, **data: object) -> None: ...


@dataclass(frozen=True)
class _Refusal:
    """A version that could not be loaded, and when to try it again."""

    version: int
    reason: str
    num_tries: int
    retry_at: float


class WeightWatcher:
    """`announced` says which version to serve; without it the newest one in the store is taken."""

    def __init__(
        self,
        *,
        store: WeightStore,
        copy: WeightCopy,
        engine: Engine,
        announced: Callable[[], int | None] | None,
        events: Events,
        poll_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._copy = copy
        self._engine = engine
        self._announced = announced or self._newest
        self._events = events
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._loaded: int | None = None
        self._refusal: _Refusal | None = None
        self._trouble = ""
        self._caught_up = threading.Event()

    @property
    def detail(self) -> str:
        """The trouble there is, empty when none."""
        refused = f"weight version {self._refusal.version} was refused: {self._refusal.reason}" if self._refusal else ""
        return "; ".join(part for part in (self._trouble, refused) if part)

    @property
    def summary(self) -> str:
        """The same without addresses and errors, for everybody."""
        refused = f"weight version {self._refusal.version} was refused" if self._refusal else ""
        return "; ".join(part for part in ("new weights can't be heard of" if self._trouble else "", refused) if part)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """The loop that the engine lives on."""
        self._loop = loop

    def catch_up(self) -> None:
        """Load the newest good version in the store, if it holds any. Blocking; before the service is ready.

        SettingsError if the folder of the own copy can't be used.
        """
        self._copy.open()
        try:
            for version in reversed(self._store.versions()):
                if self._try_version(version):
                    break
        except OSError as exc:
            self._hear_nothing(exc)
        self._caught_up.set()

    @contextlib.asynccontextmanager
    async def watching(self, on_failure: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Poll in a thread meanwhile. `on_failure` gets what no retry can mend."""
        thread = threading.Thread(target=self._run, args=(on_failure,), name="weights", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.join, _STOP_S)
            self._copy.close()

    def check(self) -> None:
        """One look: load what is announced if it is new and not refused a moment ago."""
        version = self._read_announced()
        if version is None or (self._loaded is not None and version <= self._loaded):
            return
        refusal = self._refusal
        if refusal and refusal.version == version and self._clock() < refusal.retry_at:
            return
        self._try_version(version)

    def _run(self, on_failure: Callable[[BaseException], None]) -> None:
        while not self._stop.wait(self._poll_interval_s):
            try:
                if self._caught_up.is_set():
                    self.check()
            except Exception as exc:
                on_failure(EngineError(f"the weight watcher broke down: {type(exc).__name__}: {exc}"))
                raise

    def _read_announced(self) -> int | None:
        try:
            version = self._announced()
            if version is not None and (self._loaded is None or version > self._loaded):
                version = self._still_there(version)
        except (StreamError, OSError) as exc:
            self._hear_nothing(exc)
            return None
        self._trouble = ""
        return version

    def _still_there(self, version: int) -> int:
        """An announced version may be deleted before a slow replica fetched it: the newest one is as good."""
        versions = self._store.versions()
        return version if version in versions else max([version, *versions])

    def _newest(self) -> int | None:
        return max(self._store.versions(), default=None)

    def _hear_nothing(self, exc: Exception) -> None:
        if not self._trouble:
            _log.warning("new weights can't be heard of, version %s stays in service: %s", self._loaded, exc)
        self._trouble = f"new weights can't be heard of: {exc}"

    def _try_version(self, version: int) -> bool:
        """True once the engine serves it, or a newer one than before that lies on the way to it."""
        try:
            staged = self._load(version)
        except (HeadwaterError, OSError) as exc:
            self._refuse(version, exc)
            return False
        self._loaded = staged.version
        if self._refusal and self._refusal.version <= staged.version:
            self._refusal = None
        metrics.policy_version.set(staged.version)
        _log.info("weights loaded", extra={"version": staged.version})
        if staged.trouble:
            self._refuse(version, WeightStoreError(staged.trouble))
        return True

    def _load(self, version: int) -> Staged:
        staged = self._copy.stage(self._store, version, with_patches=self._takes_patches())
        began = time.perf_counter()
        try:
            if self._loaded is not None and staged.version <= self._loaded:
                raise WeightStoreError(staged.trouble or f"only version {staged.version} could be had")
            self._switch_engine(staged)
        except BaseException:
            self._copy.discard(staged)
            raise
        self._copy.adopt(staged)
        metrics.weight_load_seconds.labels("apply").observe(time.perf_counter() - began)
        return staged

    def _takes_patches(self) -> bool:
        """Whether the engine can go from the own copy's version, which it must serve, to the next in place."""
        engine = self._engine
        return isinstance(engine, PatchableEngine) and engine.can_patch and engine.weight_version == self._copy.version

    def _switch_engine(self, staged: Staged) -> None:
        if not self._patch_engine(staged):
            self._wait_for(self._engine.load_weights(staged.folder, staged.version))

    def _patch_engine(self, staged: Staged) -> bool:
        """False where the whole version must be loaded: that also heals what a failed patch has left."""
        engine = self._engine
        if staged.patches is None or staged.base is None or not isinstance(engine, PatchableEngine):
            return False
        try:
            self._wait_for(engine.patch_weights(staged.patches, base=staged.base, version=staged.version))
        except (EngineError, OSError) as exc:
            _log.warning("weight version %d can't be patched in, all of it is loaded: %s", staged.version, exc)
            metrics.failed_patches_total.inc()
            return False
        return True

    def _wait_for(self, switching: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None, "bind() comes first"
        asyncio.run_coroutine_threadsafe(switching, self._loop).result(LOAD_TIMEOUT_S)

    def _refuse(self, version: int, exc: Exception) -> None:
        before = self._refusal
        num_tries = before.num_tries + 1 if before and before.version == version else 1
        wait_s = min(_MAX_RETRY_S, _FIRST_RETRY_S * 2 ** (num_tries - 1))
        self._refusal = _Refusal(version, str(exc), num_tries, self._clock() + wait_s)
        _log.warning(
            "weight version %d refused, version %s stays in service: %s",
            version,
            self._loaded,
            exc,
            extra={"num_tries": num_tries, "retry_in_s": wait_s},
        )
        if num_tries == 1:
            metrics.refused_weights_total.inc()
            self._events.record("refused_weights", str(exc), version=version, serving=self._loaded)
