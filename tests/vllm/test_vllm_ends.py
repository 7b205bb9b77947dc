"""The ways an engine can end. (The death of its core is in test_vllm_adapters.py.)"""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.base import Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError
from tests.cli.launched import is_alive
from tests.services.serving import wait_until
from tests.vllm.subjects import vllm_subject

PROMPT = list(range(20, 90))
GREEDY = Sampling(max_tokens=12, temperature=0)


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
