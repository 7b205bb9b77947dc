"""The life of the engine behind a service: it starts beside the server, so that /healthz answers while a model loads.

    life = EngineLife(engine, build=judge_of)
    app = create_app(..., readiness=lambda: Readiness(ready=life.ready, detail=life.detail),
                     summary=lambda: life.summary, lifespan=life.lifespan)
    life.service.judge(...)    # what `judge_of` returned; EngineError until then

A failed start is left in `app.state.failure`, which ends the process with that error (services/serve.py). So is the
failure of an engine that will never answer again: whoever started the service starts it anew.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from fastapi import FastAPI

from services.engine.base import Engine, FallibleEngine
from shared.errors import EngineError, HeadwaterError

_WATCH_S = 0.5

T = TypeVar("T")


class EngineLife(Generic[T]):
    """`build` runs once the engine can answer, and the service is ready when it returns."""

    def __init__(self, engine: Engine, *, build: Callable[[], Awaitable[T]]) -> None:
        self._engine = engine
        self._build = build
        self._service: T
        self.ready = False
        self.detail = self.summary = "the engine is starting"
        """`summary` is for everybody: it repeats no error."""

    def check_ready(self) -> None:
        """Raise EngineError (503, try again) while the engine can't answer."""
        if not self.ready:
            raise EngineError(f"not ready: {self.detail}")

    @property
    def service(self) -> T:
        """What `build` returned. Raises EngineError until it is ready."""
        self.check_ready()
        return self._service

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._start(app))]
        if isinstance(self._engine, FallibleEngine):
            tasks.append(asyncio.create_task(self._watch(app, self._engine)))
        try:
            yield
        finally:
            self._note("the service is stopping")
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self._engine.close()

    async def _start(self, app: FastAPI) -> None:
        try:
            await self._engine.start()
            self._service = await self._build()
        except HeadwaterError as exc:
            self._note("the engine could not start", str(exc))
            app.state.failure = exc
            return
        except Exception as exc:
            app.state.failure = EngineError(f"{self._engine.name} could not start: {type(exc).__name__}: {exc}")
            raise
        self.ready, self.detail, self.summary = True, "", ""

    async def _watch(self, app: FastAPI, engine: FallibleEngine) -> None:
        while not engine.failure:  # noqa: ASYNC110 (the end of another process can only be looked for)
            await asyncio.sleep(_WATCH_S)
        self._note("the engine has failed", engine.failure)
        app.state.failure = EngineError(engine.failure)

    def _note(self, summary: str, reason: str = "") -> None:
        """Not ready, and why."""
        self.ready, self.summary, self.detail = False, summary, f"{summary}: {reason}" if reason else summary
