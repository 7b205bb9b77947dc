"""The life of the engine behind a service: it starts beside the server, so that /healthz answers while a model loads.

    life = EngineLife(engine)
    app = create_app(..., readiness=lambda: Readiness(ready=life.ready, detail=life.detail), lifespan=life.lifespan)

A failed start is left in `app.state.failure`, which ends the process with that error (services/serve.py).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI

from services.engine.base import Engine
from shared.errors import EngineError, HeadwaterError


class EngineLife:
    """`after_start` runs once the engine can answer and before the service is ready."""

    def __init__(self, engine: Engine, *, after_start: Callable[[], Awaitable[None]] | None = None) -> None:
        self._engine = engine
        self._after_start = after_start
        self.ready = False
        self.detail = "the engine is starting"

    def check_ready(self) -> None:
        """Raise EngineError (503, try again) while the engine can't answer."""
        if not self.ready:
            raise EngineError(f"not ready: {self.detail}")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(self._start(app))
        try:
            yield
        finally:
            self.ready, self.detail = False, "the service is stopping"
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await self._engine.close()

    async def _start(self, app: FastAPI) -> None:
        try:
            await self._engine.start()
            if self._after_start is not None:
                await self._after_start()
        except HeadwaterError as exc:
            self.detail = f"the engine could not start: {exc}"
            app.state.failure = exc
            return
        except Exception as exc:
            app.state.failure = EngineError(f"{self._engine.name} could not start: {type(exc).__name__}: {exc}")
            raise
        self.ready, self.detail = True, ""
