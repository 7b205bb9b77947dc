"""The weight watcher: a thread that loads announced weight versions into the engine.

    announced (Redis) --poll--> fetch, verify, update the replica's copy (weight_copy.py); the engine keeps generating
                      --------> engine.patch_weights, or engine.load_weights --> served

If an update fails, the last good version stays in service. The failure is counted, logged, recorded as an event and
shown in /status; it is retried with backoff, or when a newer version is announced.

Within an epoch, a version is new if its number is higher. A version of another epoch is always new: the trainer started
over (trainer/publisher.py), and the loaded one belongs to a policy that is no longer trained.
"""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from services.engine.base import Engine, PatchableEngine
from services.rollout.weight_copy import CopyState, Staged, WeightCopy
from shared import metrics
from shared.coordination import AnnouncedWeights
from shared.errors import DatabaseError, EngineError, HeadwaterError, SettingsError, StreamError, WeightStoreError
from shared.retries import doubled_s
from shared.runs import open_run
from shared.settings import Settings
from shared.weights.store import Manifest, WeightStore

_log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
_FIRST_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_STOP_S = 5.0


@dataclass(frozen=True)
class _Refusal:
    """A version that could not be loaded, and when to retry it."""

    wanted: AnnouncedWeights
    reason: str
    num_tries: int
    retry_at: float

    @property
    def summary(self) -> str:
        return f"weight version {self.wanted.version} was refused"


@dataclass(kw_only=True)
class WeightWatcher:
    """Serves what `announced` returns, or without it the newest version in the store."""

    store: WeightStore
    copy: WeightCopy
    engine: Engine
    announced: Callable[[], AnnouncedWeights | None] | None
    record_event: Callable[..., None]
    poll_interval_s: float
    clock: Callable[[], float] = time.monotonic
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False)
    _caught_up: threading.Event = field(default_factory=threading.Event, init=False)
    _loaded: CopyState | None = field(default=None, init=False)
    _refusal: _Refusal | None = field(default=None, init=False)
    _trouble: str = field(default="", init=False)

    @property
    def detail(self) -> str:
        """What is wrong; empty if nothing is."""
        refused = f"{self._refusal.summary}: {self._refusal.reason}" if self._refusal else ""
        return "; ".join(filter(None, (self._trouble, refused)))

    @property
    def summary(self) -> str:
        """The same without addresses and error texts, for `/readyz`."""
        refused = self._refusal.summary if self._refusal else ""
        return "; ".join(filter(None, ("can't look for new weights" if self._trouble else "", refused)))

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Set the event loop that the engine runs on."""
        self._loop = loop

    def catch_up(self) -> None:
        """Load the newest good version in the store, if any. Blocks. SettingsError for a folder that can't be used."""
        self.copy.open()
        try:
            for version in reversed(self.store.versions()):
                if self._try_manifest(version):
                    break
        except OSError as exc:
            self._report_trouble(exc)
        self._caught_up.set()

    @contextlib.asynccontextmanager
    async def watching(self, on_failure: Callable[[BaseException], None]) -> AsyncIterator[None]:
        """Poll in a thread. `on_failure` gets an error that no retry can fix."""
        thread = threading.Thread(target=self._run, args=(on_failure,), name="weights", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            await asyncio.to_thread(thread.join, _STOP_S)
            self.copy.close()

    def check(self) -> None:
        """Load the announced version if it is new and due."""
        wanted, refusal = self._read_announced(), self._refusal
        if wanted is None:
            return
        if not self._is_new(wanted):
            self.copy.keep_up()
        elif refusal is None or refusal.wanted != wanted or self.clock() >= refusal.retry_at:
            self._try_version(wanted)

    def _run(self, on_failure: Callable[[BaseException], None]) -> None:
        while not self._stop.wait(self.poll_interval_s):
            try:
                if self._caught_up.is_set():
                    self.check()
            except Exception as exc:
                on_failure(EngineError(f"the weight watcher failed: {type(exc).__name__}: {exc}"))
                raise

    def _read_announced(self) -> AnnouncedWeights | None:
        try:
            wanted = (self.announced or self._newest)()
            if wanted is not None and self._is_new(wanted):
                wanted = self._still_there(wanted)
        except (StreamError, OSError) as exc:
            self._report_trouble(exc)
            return None
        self._trouble = ""
        return wanted

    def _is_new(self, wanted: AnnouncedWeights) -> bool:
        loaded = self._loaded
        return loaded is None or wanted.epoch != loaded.epoch or wanted.version > loaded.version

    def _still_there(self, wanted: AnnouncedWeights) -> AnnouncedWeights:
        """If the announced version was deleted before this replica fetched it, the newest of its epoch."""
        versions = self.store.versions()
        if wanted.version in versions or max(versions, default=-1) < wanted.version:
            return wanted
        newest = self._newest()
        return newest if newest and newest.epoch == wanted.epoch else wanted

    def _newest(self) -> AnnouncedWeights | None:
        version = max(self.store.versions(), default=None)
        if version is None:
            return None
        try:
            return AnnouncedWeights(version, self.store.manifest(version).epoch)
        except WeightStoreError:
            return AnnouncedWeights(version)  # refused as soon as it is tried

    def _report_trouble(self, exc: Exception) -> None:
        if not self._trouble:
            _log.warning("can't look for new weights, version %s stays in service: %s", self._serving, exc)
        self._trouble = f"can't look for new weights: {exc}"

    @property
    def _serving(self) -> int | None:
        return self._loaded.version if self._loaded else None

    def _try_manifest(self, version: int) -> bool:
        """Load a version of any epoch."""
        try:
            wanted = AnnouncedWeights(version, self.store.manifest(version).epoch)
        except WeightStoreError as exc:
            self._refuse(AnnouncedWeights(version), exc)
            return False
        return self._try_version(wanted)

    def _try_version(self, wanted: AnnouncedWeights) -> bool:
        """True if the engine now serves it, or at least a newer version than before."""
        try:
            staged = self._load(wanted)
        except (HeadwaterError, OSError) as exc:
            self._refuse(wanted, exc)
            return False
        self._loaded = loaded = staged.state
        refusal = self._refusal
        if refusal and (refusal.wanted.epoch != loaded.epoch or not self._is_new(refusal.wanted)):
            self._refusal = None
        metrics.weight_version.set(loaded.version)
        _log.info("weights loaded", extra={"version": loaded.version, "epoch": loaded.epoch})
        if staged.trouble:
            self._refuse(wanted, WeightStoreError(staged.trouble))
        return True

    def _load(self, wanted: AnnouncedWeights) -> Staged:
        staged = self.copy.stage(self.store, self._manifest(wanted), with_changes=self._takes_changes())
        began = time.perf_counter()
        try:
            if not self._is_new(AnnouncedWeights(staged.state.version, staged.state.epoch)):
                raise WeightStoreError(staged.trouble or f"only version {staged.state.version} could be fetched")
            if not self._patch_engine(staged):
                staged = self.copy.write(staged)
                assert staged.folder is not None
                self._wait_for(self.engine.load_weights(staged.folder, staged.state.version))
        except BaseException:
            self.copy.discard(staged)
            raise
        metrics.weight_load_seconds.labels("apply").observe(time.perf_counter() - began)
        self.copy.adopt(staged)
        return staged

    def _manifest(self, wanted: AnnouncedWeights) -> Manifest:
        manifest = self.store.manifest(wanted.version)
        if manifest.epoch != wanted.epoch:
            raise WeightStoreError(
                f"weight version {wanted.version} in {self.store.root} is of epoch {manifest.epoch or 'none'}, the "
                f"announced one is of epoch {wanted.epoch or 'none'}: the store was wiped or restored, or is not the "
                "trainer's; set weights.store, or restart the trainer"
            )
        return manifest

    def _takes_changes(self) -> bool:
        """Whether the engine serves the version of the replica's copy and can patch it in place."""
        engine, loaded = self.engine, self._loaded
        serves_copy = loaded is not None and loaded == self.copy.current and engine.weight_version == loaded.version
        return serves_copy and isinstance(engine, PatchableEngine) and engine.can_patch

    def _patch_engine(self, staged: Staged) -> bool:
        """False if the full version must be loaded instead, which also repairs what a failed patch left."""
        engine, changes = self.engine, staged.changes
        if changes is None or not isinstance(engine, PatchableEngine):
            return False
        version, last_good = staged.state.version, changes.last_good
        try:
            self._wait_for(engine.patch_weights(changes.file, base=changes.base, version=version, last_good=last_good))
        except (EngineError, OSError) as exc:
            _log.warning("weight version %d can't be patched in, loading it in full: %s", version, exc)
            metrics.failed_patches_total.inc()
            return False
        return True

    def _wait_for(self, switching: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None, "bind() comes first"
        asyncio.run_coroutine_threadsafe(switching, self._loop).result(LOAD_TIMEOUT_S)

    def _refuse(self, wanted: AnnouncedWeights, exc: Exception) -> None:
        before = self._refusal
        num_tries = before.num_tries + 1 if before and before.wanted == wanted else 1
        wait_s = doubled_s(num_tries, first_s=_FIRST_RETRY_S, max_s=_MAX_RETRY_S)
        self._refusal = _Refusal(wanted, str(exc), num_tries, self.clock() + wait_s)
        what = "weight version %d refused, version %s stays in service: %s"
        _log.warning(what, wanted.version, self._serving, exc, extra={"num_tries": num_tries, "retry_in_s": wait_s})
        if num_tries == 1:
            metrics.refused_weights_total.inc()
            self.record_event("refused_weights", str(exc), version=wanted.version, serving=self._serving)


def event_recorder(settings: Settings) -> Callable[..., None]:
    """A blocking function `record(kind, message, **data)` for events of the replica; connects at the first one.

    If the database is away, or has the run with another identity, the event is only in the log.
    """
    run = functools.cache(lambda: open_run(settings))

    def record(kind: str, message: str, **data: Any) -> None:
        try:
            run().record_event("rollout", kind, message, **data)
        except (DatabaseError, SettingsError) as exc:
            _log.warning("event %s is not in the database: %s", kind, exc)

    return record
