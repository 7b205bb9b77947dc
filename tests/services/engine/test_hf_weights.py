"""The transformers engine takes changed elements in place: the same weights as a whole load, or nothing at all."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.base import PatchableEngine, Sampling
from services.engine.hf.engine import TransformersEngine
from shared.errors import EngineError
from shared.settings import EngineSettings

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
Tensors = dict[str, Tensor]


def bfloat16_weights(model: Path) -> Tensors:
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / "model.safetensors").items()}


def write_patches(file: Path, before: Tensors, after: Tensors) -> None:
    tensors: Tensors = {}
    shapes: dict[str, list[int]] = {}
    for name in after:
        indices = torch.nonzero((before[name] != after[name]).flatten()).flatten()
        tensors |= {f"{name}.indices": indices, f"{name}.values": after[name].flatten()[indices]}
        shapes[name] = list(after[name].shape)
    save_file(tensors, file, {"shapes": json.dumps(shapes)})


def changed(weights: Tensors) -> Tensors:
    """Every seventh element, the tied embedding among them."""
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in moved.values():
        tensor.flatten()[::7] += 0.5
    return moved


def engine_of(model: Path, dtype: str = "float32") -> TransformersEngine:
    return TransformersEngine(EngineSettings.model_validate({"model": str(model), "device": "cpu", "dtype": dtype}))


def weights_of(engine: TransformersEngine) -> Tensors:
    return {name: tensor.clone() for name, tensor in engine._started.module.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_patched_weights_are_those_of_a_whole_load(tiny_model: Path, tmp_path: Path, dtype: str) -> None:
    base = bfloat16_weights(tiny_model)
    new = changed(base)
    for name, weights in (("base", base), ("new", new)):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    write_patches(tmp_path / "patches", base, new)

    async def run() -> None:
        patched, loaded = engine_of(tiny_model, dtype), engine_of(tiny_model, dtype)
        assert isinstance(patched, PatchableEngine)
        assert patched.can_patch
        for engine in (patched, loaded):
            await engine.start()
        await patched.load_weights(tmp_path / "base", 4)
        await patched.patch_weights(tmp_path / "patches", base=4, version=5, last_good=[tmp_path / "base"])
        await loaded.load_weights(tmp_path / "new", 5)
        one, other = weights_of(patched), weights_of(loaded)
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert torch.equal(one["lm_head.weight"], one[EMBEDDING])
        (generations,) = await patched.generate([[5, 6, 7]], Sampling(max_tokens=4, temperature=0))
        assert generations[0].weight_version == 5
        for engine in (patched, loaded):
            await engine.close()

    asyncio.run(run())


def _spoil(tensors: Tensors, shapes: dict[str, list[int]], kind: str) -> None:
    indices = tensors[f"{NORM}.indices"]
    match kind:
        case "the model has no tensor":
            for part in ("indices", "values"):
                tensors[f"x.{part}"] = tensors[f"{NORM}.{part}"].clone()
            shapes["x"] = shapes[NORM]
        case "has shape":
            shapes[NORM] = [64]
        case "has dtype":
            tensors[f"{NORM}.values"] = torch.ones(len(indices), dtype=torch.int16)
        case "holds NaN":
            tensors[f"{NORM}.values"][0] = float("nan")
        case "do not ascend within its 32 elements":
            indices[-1] = 32
        case "not int64, one per value":
            tensors[f"{NORM}.indices"] = indices.to(torch.int32)
        case _:
            del tensors[f"{NORM}.values"]


@pytest.mark.parametrize(
    "kind",
    [
        "the model has no tensor",
        "has shape",
        "has dtype",
        "holds NaN",
        "do not ascend within its 32 elements",
        "not int64, one per value",
        "does not hold readable patches",
    ],
)
def test_patches_that_do_not_fit_change_nothing(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    base = bfloat16_weights(tiny_model)
    write_patches(tmp_path / "good", base, changed(base))
    tensors = load_file(tmp_path / "good")
    shapes = {name: list(tensor.shape) for name, tensor in base.items()}
    _spoil(tensors, shapes, kind)
    save_file(tensors, tmp_path / "patches", {"shapes": json.dumps(shapes)})
    _refused(tiny_model, tmp_path / "patches", base=0, words=kind)


def test_patches_of_another_base_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    base = bfloat16_weights(tiny_model)
    write_patches(tmp_path / "patches", base, changed(base))
    _refused(tiny_model, tmp_path / "patches", base=3, words="changes since version 3 do not fit version 0")


@pytest.mark.parametrize("order", [lambda indices: indices.flip(0), lambda indices: indices[:1].expand(len(indices))])
def test_indices_out_of_order_or_twice_are_refused(
    tiny_model: Path, tmp_path: Path, order: Callable[[Tensor], Tensor]
) -> None:
    base = bfloat16_weights(tiny_model)
    write_patches(tmp_path / "good", base, changed(base))
    tensors = load_file(tmp_path / "good")
    tensors[f"{NORM}.indices"] = order(tensors[f"{NORM}.indices"]).contiguous()
    shapes = {name: list(tensor.shape) for name, tensor in base.items()}
    save_file(tensors, tmp_path / "patches", {"shapes": json.dumps(shapes)})
    _refused(tiny_model, tmp_path / "patches", base=0, words="do not ascend")


def _refused(model: Path, patches: Path, *, base: int, words: str) -> None:
    async def run() -> None:
        engine = engine_of(model)
        await engine.start()
        before = weights_of(engine)
        with pytest.raises(EngineError, match=words):
            await engine.patch_weights(patches, base=base, version=1, last_good=[])
        after = weights_of(engine)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert engine.weight_version == 0
        await engine.close()

    asyncio.run(run())
