"""The weight watcher: brings announced weight versions from the store into the engine. One thread of its own.

    announced (Redis) --poll--> fetch, compare checksums, change the own copy (weight_copy.py), the engine generates on
                      --------> engine.patch_weights, where it can, or engine.load_weights --> version served

Whatever fails before the engine has switched leaves the last good version in service: it is counted, logged, written
as an event and shown in /status, and tried again with backoff or when a newer version is announced.

A version is newer if its number is higher within its epoch. One of another epoch is taken whatever its number: the
trainer has begun anew (trainer/publisher.py), and what is loaded belongs to a policy that is no longer trained.
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
from services.rollout.weight_copy import CopyState, Staged, WeightCopy
from shared import metrics
from shared.coordination import AnnouncedWeights
from shared.errors import DatabaseError, EngineError, HeadwaterError, SettingsError, StreamError, WeightStoreError
from shared.runs import Run, open_run
from shared.settings import Settings
from shared.weights.store import Manifest, WeightStore

_log = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
_FIRST_RETRY_S, _MAX_RETRY_S = 1.0, 60.0
_STOP_S = 5.0


class Events(Protocol):
    def record(self, kind: str, message: str, **data: object) -> None: ...


@dataclass(frozen=True)
class _Refusal:
    """A version that could not be loaded, and when to try it again."""

    wanted: AnnouncedWeights
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
        announced: Callable[[], AnnouncedWeights | None] | None,
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
        self._loaded: CopyState | None = None
        self._refusal: _Refusal | None = None
        self._trouble = ""
        self._caught_up = threading.Event()

    @property
    def detail(self) -> str:
        """The trouble there is, empty when none."""
        refused = (
            f"weight version {self._refusal.wanted.version} was refused: {self._refusal.reason}"
            if self._refusal
            else ""
        )
        return "; ".join(part for part in (self._trouble, refused) if part)

    @property
    def summary(self) -> str:
        """The same without addresses and errors, for everybody."""
        refused = f"weight version {self._refusal.wanted.version} was refused" if self._refusal else ""
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
                if self._try_manifest(version):
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
        wanted = self._read_announced()
        if wanted is None:
            return
        if not self._is_new(wanted):
            self._copy.keep_up()
            return
        refusal = self._refusal
        if refusal and refusal.wanted == wanted and self._clock() < refusal.retry_at:
            return
        self._try_version(wanted)

    def _run(self, on_failure: Callable[[BaseException], None]) -> None:
        while not self._stop.wait(self._poll_interval_s):
            try:
                if self._caught_up.is_set():
                    self.check()
            except Exception as exc:
                on_failure(EngineError(f"the weight watcher broke down: {type(exc).__name__}: {exc}"))
                raise

    def _read_announced(self) -> AnnouncedWeights | None:
        try:
            wanted = self._announced()
            if wanted is not None and self._is_new(wanted):
                wanted = self._still_there(wanted)
        except (StreamError, OSError) as exc:
            self._hear_nothing(exc)
            return None
        self._trouble = ""
        return wanted

    def _is_new(self, wanted: AnnouncedWeights) -> bool:
        loaded = self._loaded
        return loaded is None or wanted.epoch != loaded.epoch or wanted.version > loaded.version

    def _still_there(self, wanted: AnnouncedWeights) -> AnnouncedWeights:
        """An announced version may be deleted before a slow replica fetched it: the newest of its epoch is as good."""
        versions = self._store.versions()
        if wanted.version in versions or max(versions, default=-1) < wanted.version:
            return wanted
        newest = self._newest()
        return newest if newest is not None and newest.epoch == wanted.epoch else wanted

    def _newest(self) -> AnnouncedWeights | None:
        version = max(self._store.versions(), default=None)
        try:
            return None if version is None else _announcement(self._store.manifest(version))
        except WeightStoreError:
            return None if version is None else AnnouncedWeights(version)  # refused as soon as it is tried

    def _hear_nothing(self, exc: Exception) -> None:
        if not self._trouble:
            _log.warning("new weights can't be heard of, version %s stays in service: %s", self._serving, exc)
        self._trouble = f"new weights can't be heard of: {exc}"

    @property
    def _serving(self) -> int | None:
        return self._loaded.version if self._loaded else None

    def _try_manifest(self, version: int) -> bool:
        """Whatever its epoch."""
        try:
            wanted = _announcement(self._store.manifest(version))
        except WeightStoreError as exc:
            self._refuse(AnnouncedWeights(version), exc)
            return False
        return self._try_version(wanted)

    def _try_version(self, wanted: AnnouncedWeights) -> bool:
        """True once the engine serves it, or a newer one than before that lies on the way to it."""
        try:
            staged = self._load(wanted)
        except (HeadwaterError, OSError) as exc:
            self._refuse(wanted, exc)
            return False
        self._loaded = staged.state
        if self._refusal and (
            self._refusal.wanted.epoch != staged.state.epoch or not self._is_new(self._refusal.wanted)
        ):
            self._refusal = None
        metrics.weight_version.set(staged.version)
        _log.info("weights loaded", extra={"version": staged.version, "epoch": staged.state.epoch})
        if staged.trouble:
            self._refuse(wanted, WeightStoreError(staged.trouble))
        return True

    def _load(self, wanted: AnnouncedWeights) -> Staged:
        staged = self._copy.stage(self._store, self._manifest(wanted), with_changes=self._takes_changes())
        began = time.perf_counter()
        try:
            if not self._is_new(AnnouncedWeights(staged.version, staged.state.epoch)):
                raise WeightStoreError(staged.trouble or f"only version {staged.version} could be had")
            if not self._patch_engine(staged):
                staged = self._copy.write(staged)
                assert staged.folder is not None
                self._wait_for(self._engine.load_weights(staged.folder, staged.version))
        except BaseException:
            self._copy.discard(staged)
            raise
        metrics.weight_load_seconds.labels("apply").observe(time.perf_counter() - began)
        self._copy.adopt(staged)
        return staged

    def _manifest(self, wanted: AnnouncedWeights) -> Manifest:
        manifest = self._store.manifest(wanted.version)
        if manifest.epoch != wanted.epoch:
            raise WeightStoreError(
                f"weight version {wanted.version} in {self._store.root} is of epoch {manifest.epoch or 'none'}, the "
                f"announced one is of epoch {wanted.epoch or 'none'}: the store was wiped or restored, or is not the "
                "trainer's; set weights.store, or start the trainer again"
            )
        return manifest

    def _takes_changes(self) -> bool:
        """Whether the engine can go from the own copy's version, which it must serve, to the next in place."""
        engine, loaded = self._engine, self._loaded
        serves_copy = loaded is not None and loaded == self._copy.current and engine.weight_version == loaded.version
        return serves_copy and isinstance(engine, PatchableEngine) and engine.can_patch

    def _patch_engine(self, staged: Staged) -> bool:
        """False where the whole version must be loaded: that also heals what a failed patch has left."""
        engine = self._engine
        changes = staged.changes
        if changes is None or not isinstance(engine, PatchableEngine):
            return False
        try:
            self._wait_for(
                engine.patch_weights(
                    changes.file, base=changes.base, version=staged.version, last_good=changes.last_good
                )
            )
        except (EngineError, OSError) as exc:
            _log.warning("weight version %d can't be patched in, all of it is loaded: %s", staged.version, exc)
            metrics.failed_patches_total.inc()
            return False
        return True

    def _wait_for(self, switching: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None, "bind() comes first"
        asyncio.run_coroutine_threadsafe(switching, self._loop).result(LOAD_TIMEOUT_S)

    def _refuse(self, wanted: AnnouncedWeights, exc: Exception) -> None:
        before = self._refusal
        num_tries = before.num_tries + 1 if before and before.wanted == wanted else 1
        wait_s = min(_MAX_RETRY_S, _FIRST_RETRY_S * 2 ** (num_tries - 1))
        self._refusal = _Refusal(wanted, str(exc), num_tries, self._clock() + wait_s)
        _log.warning(
            "weight version %d refused, version %s stays in service: %s",
            wanted.version,
            self._serving,
            exc,
            extra={"num_tries": num_tries, "retry_in_s": wait_s},
        )
        if num_tries == 1:
            metrics.refused_weights_total.inc()
            self._events.record("refused_weights", str(exc), version=wanted.version, serving=self._serving)


def _announcement(manifest: Manifest) -> AnnouncedWeights:
    return AnnouncedWeights(manifest.version, manifest.epoch)


class RunEvents:
    """Opens the database at the first event. Blocking."""

    def __init__(self, settings: Settings, *, role: str) -> None:
        self._settings = settings
        self._role = role
        self._run: Run | None = None

    def record(self, kind: str, message: str, **data: Any) -> None:
        """A database that is away, or that has the run with another identity, costs the event, not the service: the
        log has it too."""
        try:
            if self._run is None:
                self._run = open_run(self._settings)
            self._run.record_event(self._role, kind, message, **data)
        except (DatabaseError, SettingsError) as exc:
            _log.warning("event %s is not in the database: %s", kind, exc)
