"""Weights that arrive while vLLM generates: applied whole, never mixed with keys of old ones, or refused."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.base import Generation, PatchableEngine, Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError
from tests.vllm import reference
from tests.vllm.subjects import Subject, until_running

PROMPT = [(11 * i) % 280 + 10 for i in range(150)]
"""Several blocks of the prefix cache."""
GREEDY = Sampling(max_tokens=24, temperature=0)
NORM = "model.norm.weight"


def answer(subject: Subject) -> Generation:
    ((generation,),) = subject.do(subject.engine.generate([PROMPT], GREEDY))
    return generation


def load(subject: Subject, folder: Path) -> int:
    """The next version."""
    version = subject.engine.weight_version + 1
    subject.do(subject.engine.load_weights(folder, version))
    return version


def altered(model: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of the model's weights after `change`."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_new_weights_answer_and_no_key_of_the_old_ones_does(
    vllm_engine: Subject, model: Path, other_model: Path
) -> None:
    """The prompt's keys lie in the prefix cache when the weights change; old keys under new weights would answer
    neither like the first model nor like the other."""
    expected = {folder: reference.greedy(folder, PROMPT, GREEDY.max_tokens) for folder in (model, other_model)}
    assert expected[model] != expected[other_model]
    for folder in (other_model, model, other_model, model):
        version = load(vllm_engine, folder)
        found = [answer(vllm_engine) for _ in range(2)]
        assert [generation.token_ids for generation in found] == [expected[folder]] * 2
        assert {generation.weight_version for generation in found} == {version}


def test_scores_follow_the_weights(vllm_engine: Subject, model: Path, other_model: Path) -> None:
    for folder in (other_model, model):
        version = load(vllm_engine, folder)
        (scores,), found = vllm_engine.do(vllm_engine.scorer.score_tokens(PROMPT, [[4, 5, 6]]))
        expected = reference.log_probs(folder, PROMPT, [4, 5, 6])
        assert [score.log_prob for score in scores] == pytest.approx(expected, abs=1e-3)
        assert found == version


def test_requests_in_flight_continue_and_carry_the_oldest_version(
    vllm_engine: Subject, model: Path, other_model: Path
) -> None:
    engine = vllm_engine.engine
    before = engine.weight_version

    async def work() -> list[Generation]:
        sampling = Sampling(max_tokens=180, num_samples=8)
        requests = [asyncio.ensure_future(engine.generate([PROMPT[:n]], sampling)) for n in (60, 70)]
        await until_running(9)  # some of both; one may have ended before the last of all has begun
        await asyncio.sleep(0.05)
        for step, folder in enumerate((other_model, model), start=1):
            await engine.load_weights(folder, before + step)
            assert not all(request.done() for request in requests)
        return [generation for request in requests for of_prompt in await request for generation in of_prompt]

    generations = vllm_engine.do(work())
    assert len(generations) == 16
    assert {generation.weight_version for generation in generations} == {before}
    assert answer(vllm_engine).weight_version == before + 2


def test_updates_that_come_together_are_applied_one_after_the_other(
    vllm_engine: Subject, model: Path, other_model: Path
) -> None:
    engine, before = vllm_engine.engine, vllm_engine.engine.weight_version

    async def work() -> None:
        await asyncio.gather(engine.load_weights(other_model, before + 1), engine.load_weights(model, before + 2))

    vllm_engine.do(work())
    assert answer(vllm_engine).token_ids == reference.greedy(model, PROMPT, GREEDY.max_tokens)


def _reshape_one(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = torch.ones(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "up_proj"),
        (_reshape_one, r"shape \(7,\)"),
        (lambda tensors: tensors[NORM].fill_(float("nan")), "NaN"),
        (lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}), "no tensor"),
        (lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int32)}), "dtype"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    vllm_engine: Subject, other_model: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    before = answer(vllm_engine)
    with pytest.raises(EngineError, match=words):
        load(vllm_engine, altered(other_model, tmp_path / "bad", change))
    assert answer(vllm_engine) == before


def test_files_that_cannot_be_read_change_nothing(vllm_engine: Subject, model: Path, tmp_path: Path) -> None:
    before = answer(vllm_engine)
    with pytest.raises(EngineError, match=r"no \*.safetensors"):
        load(vllm_engine, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(EngineError, match="not a readable"):
        load(vllm_engine, tmp_path)
    assert answer(vllm_engine) == before


def test_an_update_that_fails_half_way_is_undone_before_anything_is_sampled(
    vllm_engine: Subject, model: Path, other_model: Path, tmp_path: Path
) -> None:
    """The files, which `load_weights` would have refused, fail in the middle of the engine core's load, while requests
    wait for it to resume."""
    engine = vllm_engine.engine
    assert isinstance(engine, VllmEngine)
    version = load(vllm_engine, model)
    bad = altered(other_model, tmp_path / "bad", _reshape_one)

    async def work() -> list[Generation]:
        request = asyncio.ensure_future(engine.generate([PROMPT] * 4, GREEDY))
        await asyncio.sleep(0)
        with pytest.raises(EngineError, match=f"version {version} is back in service"):
            await engine._switch("full", bad, version=version + 1)
        return [generation for (generation,) in await request]

    expected = reference.greedy(model, PROMPT, GREEDY.max_tokens)
    assert [generation.token_ids for generation in vllm_engine.do(work())] == [expected] * 4
    again = answer(vllm_engine)
    assert (again.token_ids, again.finish_reason, again.weight_version) == (expected, "length", version)
    assert engine.failure == ""
    load(vllm_engine, other_model)
    assert answer(vllm_engine).token_ids == reference.greedy(other_model, PROMPT, GREEDY.max_tokens)
    load(vllm_engine, model)


def test_a_cpu_takes_whole_versions_only(vllm_engine: Subject, tmp_path: Path) -> None:
    engine = vllm_engine.engine
    assert isinstance(engine, PatchableEngine)
    assert not engine.can_patch
    version = engine.weight_version
    with pytest.raises(EngineError, match="takes no patches"):
        vllm_engine.do(engine.patch_weights(tmp_path / "patches", base=version, version=version + 1, last_good=[]))
