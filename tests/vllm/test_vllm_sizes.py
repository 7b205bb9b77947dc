"""A model split over two workers, and two copies behind one engine: answers and weight updates are those of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.engine.base import Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError
from tests.vllm import reference
from tests.vllm.subjects import Subject, vllm_subject

PROMPTS = [[(11 * i + start) % 280 + 10 for i in range(60)] for start in range(12)]
"""Enough for both copies to get some."""
GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture(scope="module", params=["tensor_parallel_size", "data_parallel_size"])
def doubled(request: pytest.FixtureRequest, model: Path) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        # vLLM gives each worker of a split model a NUMA node of its own; this machine may have one only.
        patch.setenv("VLLM_CPU_SIM_MULTI_NUMA", "1")
        sizes: dict[str, Any] = {request.param: 2}
        with vllm_subject(model, **sizes) as subject:
            yield subject


def answers(subject: Subject) -> tuple[list[tuple[int, ...]], set[int]]:
    """Greedy tokens of every prompt, and the weight versions that they were sampled under."""
    found = [of_prompt[0] for of_prompt in subject.do(subject.engine.generate(PROMPTS, GREEDY))]
    return [generation.token_ids for generation in found], {generation.weight_version for generation in found}


def expected(model: Path) -> list[tuple[int, ...]]:
    return [reference.greedy(model, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def test_every_worker_has_the_weights_of_the_version_that_is_named(
    doubled: Subject, model: Path, other_model: Path
) -> None:
    assert answers(doubled) == (expected(model), {0})
    for version, folder in enumerate((other_model, model), start=1):
        doubled.do(doubled.engine.load_weights(folder, version))
        assert answers(doubled) == (expected(folder), {version})


def test_an_update_that_some_workers_have_and_others_not_is_undone_in_all(
    doubled: Subject, model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = doubled.engine
    assert isinstance(engine, VllmEngine)
    doubled.do(engine.load_weights(model, 5))
    transfer = engine._core.transfer
    calls = []

    async def breaks_off(form: str, path: Path, *, version: int) -> None:
        calls.append(version)
        await transfer(form, path, version=version)  # type: ignore[arg-type]
        if len(calls) == 1:
            raise EngineError("one of them said no")

    monkeypatch.setattr(engine._core, "transfer", breaks_off)
    with pytest.raises(EngineError, match="version 6 could not be applied, version 5 is back in service"):
        doubled.do(engine.load_weights(other_model, 6))
    assert calls == [6, 5]
    assert answers(doubled) == (expected(model), {5})
