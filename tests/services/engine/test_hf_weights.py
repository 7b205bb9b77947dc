"""The transformers engine takes changed elements in place: the same weights as a whole load, or nothing at all."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.base import PatchableEngine, Sampling
from services.engine.hf.engine import TransformersEngine
from shared.errors import EngineError
from tests.services.engine.test_hf_engine import run, started

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

    with started(tiny_model, dtype=dtype) as patched, started(tiny_model, dtype=dtype) as loaded:
        assert isinstance(patched, PatchableEngine)
        assert patched.can_patch
        run(patched.load_weights(tmp_path / "base", 4))
        run(patched.patch_weights(tmp_path / "patches", base=4, version=5, last_good=[tmp_path / "base"]))
        run(loaded.load_weights(tmp_path / "new", 5))
        one, other = weights_of(patched), weights_of(loaded)
        assert all(torch.equal(one[name], other[name]) for name in other)
        assert torch.equal(one["lm_head.weight"], one[EMBEDDING])
        ((generation,),) = run(patched.generate([[5, 6, 7]], Sampling(max_tokens=4, temperature=0)))
        assert generation.weight_version == 5


def _spoil(tensors: Tensors, shapes: dict[str, list[int]], kind: str) -> None:
    indices, values = tensors[f"{NORM}.indices"], tensors[f"{NORM}.values"]
    match kind:
        case "the model has no tensor":
            tensors |= {"x.indices": indices.clone(), "x.values": values.clone()}
            shapes["x"] = shapes[NORM]
        case "has shape":
            shapes[NORM] = [64]
        case "has dtype":
            tensors[f"{NORM}.values"] = torch.ones(len(indices), dtype=torch.int16)
        case "holds NaN":
            values[0] = float("nan")
        case "do not ascend within its 32 elements":
            indices[-1] = 32
        case "do not ascend":
            tensors[f"{NORM}.indices"] = indices.flip(0).contiguous()
        case "ascend within":
            tensors[f"{NORM}.indices"] = indices[:1].repeat(len(indices))
        case "not int64, one per value":
            tensors[f"{NORM}.indices"] = indices.to(torch.int32)
        case "does not hold readable patches":
            del tensors[f"{NORM}.values"]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    """At version 0, which no refused patch may change."""
    with started(tiny_model) as engine:
        yield engine


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (0, "the model has no tensor"),
        (0, "has shape"),
        (0, "has dtype"),
        (0, "holds NaN"),
        (0, "do not ascend within its 32 elements"),
        (0, "do not ascend"),  # in the other order
        (0, "ascend within"),  # the same one again and again
        (0, "not int64, one per value"),
        (0, "does not hold readable patches"),
        (3, "changes since version 3 do not fit version 0"),
    ],
)
def test_patches_that_do_not_fit_change_nothing(
    engine: TransformersEngine, tiny_model: Path, tmp_path: Path, base: int, words: str
) -> None:
    weights = bfloat16_weights(tiny_model)
    write_patches(tmp_path / "patches", weights, changed(weights))
    tensors, shapes = load_file(tmp_path / "patches"), {name: list(tensor.shape) for name, tensor in weights.items()}
    _spoil(tensors, shapes, words)
    save_file(tensors, tmp_path / "spoilt", {"shapes": json.dumps(shapes)})
    before = weights_of(engine)
    with pytest.raises(EngineError, match=words):
        run(engine.patch_weights(tmp_path / "spoilt", base=base, version=1, last_good=[]))
    after = weights_of(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.weight_version == 0
