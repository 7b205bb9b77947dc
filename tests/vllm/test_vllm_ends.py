"""The ways an engine can end."""

import asyncio
import json
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.base import Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError
from tests.cli.launched import is_alive
from tests.services.serving import wait_until
from tests.vllm import reference
from tests.vllm.subjects import Subject, vllm_subject

PROMPT = list(range(20, 90))
GREEDY = Sampling(max_tokens=12, temperature=0)
Processes = set[multiprocessing.process.BaseProcess]


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter in PEFT's form: rank 4 on the query projections, strong enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    settings = kind | {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, 128, generator=drawn)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 4, generator=drawn)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def engine_cores() -> Processes:
    return {child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")}


@pytest.fixture(scope="module")
def other_cores() -> Processes:
    """Of engines that other modules share."""
    return engine_cores()


@pytest.fixture(scope="module")
def adapted(model: Path, adapter: Path, other_cores: Processes) -> Iterator[Subject]:
    with vllm_subject(model, lora_adapter=str(adapter)) as subject:
        yield subject


def merged(model: Path, adapter: Path, folder: Path) -> Path:
    """The model with the adapter worked into its weights: W + B A, since alpha / r is 1."""
    tensors = load_file(model / "model.safetensors")
    low_rank = load_file(adapter / "adapter_model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (low_rank[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        tensors[f"{name}.weight"] += b @ a
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


def test_an_adapter_shapes_every_answer(adapted: Subject, adapter: Path, tmp_path: Path) -> None:
    whole = merged(adapted.model, adapter, tmp_path / "merged")
    ((generation,),) = adapted.do(adapted.engine.generate([PROMPT], GREEDY))
    assert generation.token_ids == reference.greedy(whole, PROMPT, 12)
    assert generation.token_ids != reference.greedy(adapted.model, PROMPT, 12)
    ((score,),) = adapted.do(adapted.engine.score(PROMPT, [[7]]))
    assert score == pytest.approx(reference.log_probs(whole, PROMPT, [7])[0], abs=1e-3)


def test_weights_under_an_adapter_are_not_replaced(adapted: Subject) -> None:
    with pytest.raises(EngineError, match="adapter"):
        adapted.do(adapted.engine.load_weights(adapted.model, 1))


def test_the_death_of_the_engine_core_fails_requests_and_shows(adapted: Subject, other_cores: Processes) -> None:
    engine = adapted.engine
    assert isinstance(engine, VllmEngine)

    async def work() -> None:
        request = asyncio.ensure_future(engine.generate([PROMPT], Sampling(max_tokens=150, num_samples=32)))
        await asyncio.sleep(0.2)
        (core,) = engine_cores() - other_cores
        core.kill()
        with pytest.raises(EngineError):
            await request

    adapted.do(work())
    wait_until(lambda: bool(engine.failure), what="the failure to show")
    with pytest.raises(EngineError, match="has died"):
        adapted.do(engine.generate([PROMPT], GREEDY))


def test_an_engine_that_cannot_go_back_never_answers_again(model: Path, other_model: Path, tmp_path: Path) -> None:
    """The last good weights are gone: what is in memory may be anything."""
    with vllm_subject(model) as subject:
        engine = subject.engine
        assert isinstance(engine, VllmEngine)
        shutil.copytree(other_model, tmp_path / "served")
        subject.do(engine.load_weights(tmp_path / "served", 1))
        shutil.rmtree(tmp_path / "served")
        tensors = load_file(other_model / "model.safetensors") | {"model.norm.weight": torch.ones(7)}
        (tmp_path / "bad").mkdir()
        save_file(tensors, tmp_path / "bad" / "model.safetensors")

        async def work() -> None:
            waiting = asyncio.ensure_future(engine.generate([PROMPT], Sampling(max_tokens=150, num_samples=32)))
            await asyncio.sleep(0.1)
            with pytest.raises(EngineError, match="so did going back"):
                await engine._switch("full", tmp_path / "bad", version=2)
            with pytest.raises(EngineError, match="lost its weights"):
                await waiting

        subject.do(work())
        assert "lost its weights" in engine.failure
        for request in (engine.generate([PROMPT], GREEDY), engine.load_weights(model, 3)):
            with pytest.raises(EngineError, match="lost its weights"):
                subject.do(request)


_KILLED = """
import asyncio, multiprocessing, os, sys
from services.engine.vllm.engine import VllmEngine
from shared.engine_settings import EngineSettings

async def main():
    engine = VllmEngine(EngineSettings(kind="vllm", model=sys.argv[1], kv_cache_gib=0.25))
    await engine.start()
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), 9)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_core_of_a_killed_service_ends_with_it(model: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "killed.py", tmp_path / "output"
    script.write_text(_KILLED)
    with output.open("wb") as written:
        command = [sys.executable, str(script), str(model)]
        subprocess.run(command, stdout=written, stderr=subprocess.DEVNULL, timeout=200, check=False)
    core = int(output.read_text())
    try:
        wait_until(lambda: not is_alive(core), what="the engine core to end")
    finally:
        if is_alive(core):
            os.kill(core, signal.SIGKILL)
