"""Builds a service's engine and runs it beside the server, so that /healthz answers while a model loads.

    engine = build_engine(settings.judge.engine)
    life = EngineLife(engine, build=lambda: open_judge(engine))
    app = create_app(..., readiness=lambda: Readiness(ready=life.ready, detail=life.detail),
                     summary=lambda: life.summary, lifespan=life.lifespan)
    life.service.judge(...)    # what `build` returned; EngineError until then

A failed start, or the failure of an engine that can never answer again, goes to `app.state.failure`, which ends the
process (services/__main__.py) for its supervisor to restart.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from services.concurrency import settle_process
from services.engine.base import Engine, FallibleEngine
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, HeadwaterError, SettingsError

if TYPE_CHECKING:
    from fastapi import FastAPI

_WATCH_S = 0.5

T = TypeVar("T")


def build_engine(
    settings: EngineSettings,
    *,
    default_model: str = "",
    tokenizer: str = "",
    constrains: bool = False,
    adapters: Sequence[str] = (),
) -> Engine:
    """The engine for `settings.kind`; its model loads later, in `Engine.start`.

    `default_model` replaces an empty `engine.model`. `tokenizer`: folder or name, if not the model's own.
    `constrains`: `Sampling.pattern` will be used. `adapters`: what `Sampling.adapter` may name, besides
    `engine.lora_adapter`; empty names are left out. SettingsError names the key to change.
    """
    settings = settings.model_copy(update={"model": settings.model or default_model})
    if not settings.model:
        raise SettingsError("engine.model is empty: name a Hugging Face folder or name, or the endpoint's model")
    if any(adapters) and settings.kind != "vllm":
        raise SettingsError(f"lora_adapter = {max(adapters)!r} needs engine.kind = 'vllm', not {settings.kind!r}")
    if settings.kind == "transformers":
        from services.engine.hf.engine import TransformersEngine

        return TransformersEngine(settings, tokenizer=tokenizer)
    if settings.kind == "vllm":
        from services.engine.vllm.engine import VllmEngine

        return VllmEngine(settings, tokenizer=tokenizer, constrains=constrains, adapters=adapters)
    from services.engine.openai import OpenAIEngine

    return OpenAIEngine(settings, constrains=constrains)


class Startable(Protocol):
    """An engine, or several together."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class EngineLife(Generic[T]):
    """`build` runs once the engine can answer; the service is ready when it returns."""

    def __init__(self, engine: Startable, *, build: Callable[[], Awaitable[T]]) -> None:
        self._engine = engine
        self._build = build
        self._service: T
        self.ready = False
        self.detail = self.summary = "the engine is starting"
        """`summary` is public: it repeats no error."""

    def check_ready(self) -> None:
        """EngineError (503, retryable) until the engine can answer."""
        if not self.ready:
            raise EngineError(f"not ready: {self.detail}")

    @property
    def service(self) -> T:
        """What `build` returned. EngineError until the service is ready."""
        self.check_ready()
        return self._service

    @contextlib.asynccontextmanager
    async def lifespan(self, app: "FastAPI") -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._start(app))]
        if isinstance(self._engine, FallibleEngine):
            tasks.append(asyncio.create_task(self._watch(app, self._engine)))
        try:
            yield
        finally:
            self._set_unready("the service is stopping")
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self._engine.close()

    async def _start(self, app: "FastAPI") -> None:
        try:
            await self._engine.start()
            self._service = await self._build()
        except HeadwaterError as exc:
            self._set_unready("the engine could not start", str(exc))
            app.state.failure = exc
            return
        except Exception as exc:
            app.state.failure = EngineError(f"{self._engine.name} could not start: {type(exc).__name__}: {exc}")
            raise
        settle_process()
        self.ready, self.detail, self.summary = True, "", ""

    async def _watch(self, app: "FastAPI", engine: FallibleEngine) -> None:
        while not engine.failure:  # noqa: ASYNC110 (the end of another process can only be polled)
            await asyncio.sleep(_WATCH_S)
        self._set_unready("the engine has failed", engine.failure)
        app.state.failure = EngineError(engine.failure)

    def _set_unready(self, summary: str, reason: str = "") -> None:
        self.ready, self.summary, self.detail = False, summary, f"{summary}: {reason}" if reason else summary
