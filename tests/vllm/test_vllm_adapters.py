"""Adapters by request, and engine arguments that are passed through: one engine core, which dies at the end."""

import asyncio
import json
import multiprocessing
import multiprocessing.process
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.base import Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError, PromptError
from tests.services.serving import wait_until
from tests.vllm import reference
from tests.vllm.subjects import Subject, vllm_subject

PROMPT = list(range(20, 90))
"""Two whole blocks of the prefix cache and a part of one."""
Processes = set[multiprocessing.process.BaseProcess]


def make_adapter(folder: Path, *, seed: int, rank: int) -> Path:
    """A LoRA adapter in PEFT's form on the query projections, strong enough to change answers."""
    folder.mkdir()
    kind = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    settings = kind | {"r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    drawn = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 128, generator=drawn)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, rank, generator=drawn)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


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


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"rank-{rank}", seed=rank, rank=rank) for rank in (4, 12)]


def engine_cores() -> Processes:
    return {child for child in multiprocessing.active_children() if child.name.startswith("EngineCore")}


@pytest.fixture(scope="module")
def other_cores() -> Processes:
    """Of engines that other modules share."""
    return engine_cores()


@pytest.fixture(scope="module")
def adapted(model: Path, adapters: list[Path], other_cores: Processes) -> Iterator[Subject]:
    """With two adapters for requests that name one."""
    sizes: dict[str, Any] = {"max_num_seqs": 5, "max_num_batched_tokens": 300, "engine_arguments": {"max_logprobs": 3}}
    with vllm_subject(model, adapters=list(map(str, adapters)), **sizes) as subject:
        yield subject


def test_each_request_is_answered_with_its_own_adapter(adapted: Subject, adapters: list[Path], tmp_path: Path) -> None:
    """The prompt is the same, so keys of one adapter in the prefix cache would show in the answers of another."""
    models = [adapted.model, *(merged(adapted.model, adapter, tmp_path / adapter.name) for adapter in adapters)]
    expected = [reference.greedy(model, PROMPT, 12) for model in models]
    assert len(set(expected)) == 3

    async def work(adapter: str) -> tuple[tuple[int, ...], float]:
        greedy = Sampling(max_tokens=12, temperature=0, adapter=adapter)
        ((generation,),) = await adapted.engine.generate([PROMPT], greedy)
        ((score,),) = await adapted.engine.score(PROMPT, [[7]], adapter=adapter)
        return generation.token_ids, score

    async def both(names: list[str]) -> list[tuple[tuple[int, ...], float]]:
        one_by_one = [await work(name) for name in names]
        together = await asyncio.gather(*map(work, names))
        assert [token_ids for token_ids, _ in together] == [token_ids for token_ids, _ in one_by_one]
        return one_by_one

    answers = adapted.do(both(["", *map(str, adapters)]))
    assert [token_ids for token_ids, _ in answers] == expected
    scores = [reference.log_probs(model, PROMPT, [7])[0] for model in models]
    assert [score for _, score in answers] == pytest.approx(scores, abs=1e-3)


def test_an_adapter_that_the_engine_was_not_started_with_is_refused(adapted: Subject) -> None:
    with pytest.raises(PromptError, match="was not started with the LoRA adapter 'elsewhere'"):
        adapted.do(adapted.engine.generate([PROMPT], Sampling(max_tokens=1, adapter="elsewhere")))


def test_the_adapter_of_the_settings_is_for_requests_that_name_none(
    adapted: Subject, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, greedy = adapted.engine, Sampling(max_tokens=12, temperature=0)
    named = adapted.do(engine.generate([PROMPT], Sampling(max_tokens=12, temperature=0, adapter=str(adapters[0]))))
    settings = engine._settings.model_copy(update={"lora_adapter": str(adapters[0])})  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_settings", settings)
    assert adapted.do(engine.generate([PROMPT], greedy)) == named


def test_weights_under_an_adapter_are_not_replaced(adapted: Subject) -> None:
    with pytest.raises(EngineError, match="adapter"):
        adapted.do(adapted.engine.load_weights(adapted.model, 1))


def test_batch_sizes_and_other_arguments_reach_vllm(adapted: Subject) -> None:
    assert isinstance(adapted.engine, VllmEngine)
    config = adapted.engine._core._llm.vllm_config
    assert (config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens) == (5, 300)
    assert config.model_config.max_logprobs == 3


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
        adapted.do(engine.generate([PROMPT], Sampling(max_tokens=1)))
