"""Engines under test, each on an event loop in its own thread, so that one started engine serves many tests."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.engine.base import Engine, TokenScorer
from services.engine.hf.engine import TransformersEngine
from services.engine.openai import OpenAIEngine
from services.rollout.app import build_app
from shared import metrics
from shared.engine_settings import EngineSettings
from tests.services.rollout.conftest import SECRETS, make_settings
from tests.services.serving import running

T = TypeVar("T")

MAX_QUEUED = 8
KEY_VARIABLE = "POLICY_KEY"
START_S, CALL_S = 300.0, 120.0


class Loop:
    """An event loop in a thread, which runs coroutines for tests."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T], *, timeout_s: float = CALL_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@dataclass(frozen=True)
class Subject:
    """A started engine."""

    engine: Engine
    loop: Loop
    model: Path

    def do(self, work: Coroutine[Any, Any, T], *, timeout_s: float = CALL_S) -> T:
        return self.loop.do(work, timeout_s=timeout_s)

    @property
    def scorer(self) -> TokenScorer:
        assert isinstance(self.engine, TokenScorer)
        return self.engine


@contextmanager
def started(engine: Engine, model: Path) -> Iterator[Subject]:
    loop = Loop()
    try:
        loop.do(engine.start(), timeout_s=START_S)
        yield Subject(engine, loop, model)
    finally:
        loop.do(engine.close())
        loop.close()


def transformers_subject(model: Path) -> AbstractContextManager[Subject]:
    settings = EngineSettings(model=str(model), device="cpu", max_queued_requests=MAX_QUEUED)
    return started(TransformersEngine(settings), model)


@contextmanager
def openai_subject(model: Path, folder: Path) -> Iterator[Subject]:
    """A client of our completions route. KEY_VARIABLE must hold its token."""
    with running(build_app(make_settings(model, folder), SECRETS)) as url:
        options = {"kind": "openai", "model": "policy", "endpoint": f"{url}/v1", "key_variable": KEY_VARIABLE}
        settings = EngineSettings.model_validate(options | {"max_queued_requests": MAX_QUEUED})
        with started(OpenAIEngine(settings), model) as subject:
            yield subject


@contextmanager
def vllm_subject(
    model: Path, *, constrains: bool = False, adapters: Sequence[str] = (), **settings: object
) -> Iterator[Subject]:
    from services.engine.vllm.engine import VllmEngine

    small = {"kind": "vllm", "model": str(model), "kv_cache_gib": 0.25, "max_queued_requests": MAX_QUEUED}
    engine = VllmEngine(EngineSettings.model_validate(small | settings), constrains=constrains, adapters=adapters)
    with started(engine, model) as subject:
        yield subject


async def until_running(num_rows: int) -> None:
    """Wait, at most 20 s, for an engine step with at least `num_rows` rows."""
    async with asyncio.timeout(20):
        while running_rows() < num_rows:  # noqa: ASYNC110 (another process fills the batch)
            await asyncio.sleep(0.005)


def running_rows() -> float:
    """Of vLLM's last step."""
    return metrics.REGISTRY.get_sample_value("headwater_engine_batch_rows") or 0.0
