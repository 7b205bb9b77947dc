"""Changed elements written in place, through vLLM's own loaders of fused tensors.

A test plugin keeps vLLM from packing linear weights on a CPU, so that they can be patched and its checksums cover them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.engine.base import Sampling
from services.engine.vllm.engine import VllmEngine
from shared.errors import EngineError
from tests.vllm import reference
from tests.vllm.plugins import UNPACKED, install
from tests.vllm.subjects import Subject, vllm_subject

PROMPT = list(range(20, 120))
GREEDY = Sampling(max_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def unpacked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder = install(tmp_path_factory.mktemp("plugin"), unpacked=UNPACKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with vllm_subject(model) as subject:
            assert isinstance(subject.engine, VllmEngine)
            subject.engine._core.can_patch = True
            yield subject


def checksums(subject: Subject) -> dict[str, str]:
    """Of every tensor in the engine core's memory."""
    engine = subject.engine
    assert isinstance(engine, VllmEngine)
    (found,) = subject.do(engine._core._llm.compute_weight_checksums())
    return dict(found)


def changed(model: Path, folder: Path, *, seed: int) -> tuple[Path, dict[str, tuple[Tensor, Tensor]]]:
    """The model with a few elements of every tensor changed, and per tensor (indices, values) of those."""
    drawn = torch.Generator().manual_seed(seed)
    tensors = load_file(model / "model.safetensors")
    changes = {}
    for name, tensor in tensors.items():
        count = max(1, tensor.numel() // 20)
        indices = torch.randperm(tensor.numel(), generator=drawn)[:count].sort().values
        values = torch.randn(count, generator=drawn)
        tensor.view(-1)[indices] = values
        changes[name] = (indices, values)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder, changes


def write_patch(file: Path, changes: dict[str, tuple[Tensor, Tensor]], shapes: dict[str, list[int]]) -> Path:
    """In the form that `PatchableEngine.patch_weights` names."""
    tensors = {f"{name}.indices": indices for name, (indices, _) in changes.items()}
    tensors |= {f"{name}.values": values for name, (_, values) in changes.items()}
    save_file(tensors, file, metadata={"shapes": json.dumps(shapes)})
    return file


def shapes_of(model: Path) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in load_file(model / "model.safetensors").items()}


def test_a_patch_leaves_the_same_bits_as_the_whole_version(unpacked: Subject, model: Path, tmp_path: Path) -> None:
    engine = unpacked.engine
    assert isinstance(engine, VllmEngine)
    whole, changes = changed(model, tmp_path / "whole", seed=1)
    patch = write_patch(tmp_path / "v.patches", changes, shapes_of(model))
    before = checksums(unpacked)

    unpacked.do(engine.patch_weights(patch, base=0, version=1, last_good=[model]))
    patched = checksums(unpacked)
    ((generation,),) = unpacked.do(engine.generate([PROMPT], GREEDY))
    unpacked.do(engine.load_weights(whole, 2))

    assert patched == checksums(unpacked)
    assert all(patched[name] != checksum for name, checksum in before.items())
    assert generation.token_ids == reference.greedy(whole, PROMPT, GREEDY.max_tokens)
    assert generation.weight_version == 1


def test_a_patch_that_fails_half_way_is_undone_and_the_last(unpacked: Subject, model: Path, tmp_path: Path) -> None:
    """Going back means the last whole version and an earlier patch."""
    engine = unpacked.engine
    assert isinstance(engine, VllmEngine)
    unpacked.do(engine.load_weights(model, 10))
    whole, changes = changed(model, tmp_path / "whole", seed=2)
    patch = write_patch(tmp_path / "a", changes, shapes_of(model))
    unpacked.do(engine.patch_weights(patch, base=10, version=11, last_good=[model]))
    good = checksums(unpacked)
    norm = {"model.norm.weight": (torch.tensor([0]), torch.tensor([1.0]))}
    bad = write_patch(tmp_path / "b", changes | norm, shapes_of(model) | {"model.norm.weight": [7]})

    with pytest.raises(EngineError, match="version 11 is back in service"):
        unpacked.do(engine._switch("patch", bad, version=12))

    assert checksums(unpacked) == good
    ((generation,),) = unpacked.do(engine.generate([PROMPT], GREEDY))
    assert generation.token_ids == reference.greedy(whole, PROMPT, GREEDY.max_tokens)
    assert not engine.can_patch
    engine._core.can_patch = True


@pytest.mark.parametrize(
    ("base", "shape", "words"), [(99, None, "changes version 99"), (None, [7], r"shape \(7,\)")], ids=["base", "shape"]
)
def test_patches_that_do_not_fit_change_nothing(
    unpacked: Subject, model: Path, tmp_path: Path, base: int | None, shape: list[int] | None, words: str
) -> None:
    engine, before = unpacked.engine, checksums(unpacked)
    assert isinstance(engine, VllmEngine)
    served = engine.weight_version
    norm = {"model.norm.weight": (torch.tensor([0]), torch.tensor([1.0]))}
    shapes = {"model.norm.weight": shape or shapes_of(model)["model.norm.weight"]}
    patch = write_patch(tmp_path / "p", norm, shapes)
    base = served if base is None else base
    with pytest.raises(EngineError, match=words):
        unpacked.do(engine.patch_weights(patch, base=base, version=served + 1, last_good=[tmp_path / "unused"]))
    assert checksums(unpacked) == before
    assert engine.weight_version == served
