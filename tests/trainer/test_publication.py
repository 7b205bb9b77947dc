"""What was published is what generates: versions of several files, full and sparse, through a replica's own copy."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from services.engine.weights import apply_patches, apply_weights, in_memory, read_patches, read_weights
from services.rollout.weight_copy import WeightCopy
from shared.weights.state import map_folder, state_checksum
from shared.weights.store import Manifest, WeightStore
from tests.trainer.conftest import MakeStack, Stack, assert_equal_weights, tiny_llama
from tests.trainer.test_snapshot import MODELS
from trainer.publisher import WeightPublisher


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.publication.MAX_FILE_BYTES", 4000)
    monkeypatch.setattr("trainer.publication.PIECE_CHANGES", 300)
    monkeypatch.setattr("trainer.publication._BLOCK_ELEMENTS", 200)


def publisher_of(stack: Stack, dtype: str) -> WeightPublisher:
    return stack.with_settings("weights", dtype=dtype, full_every=3, keep_versions=20).prepare_lead().publisher


def move(model: PreTrainedModel, step: int) -> None:
    """Most elements of some tensors, none of others."""
    draw = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if (number + step) % 3:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=1e-3)


def rounded_model(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model.to(dtype)  # type: ignore[arg-type]
    return model


def expected_checksum(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> str:
    """By the library's own way: a rounded copy of the model, saved."""
    rounded_model(copy.deepcopy(model), dtype).save_pretrained(folder)
    return state_checksum(map_folder(folder))


@pytest.mark.parametrize("kind", ["llama, tied", "qwen3-moe"])
def test_a_replicas_copy_has_the_trainers_rounded_weights(kind: str, make_stack: MakeStack, tmp_path: Path) -> None:
    stack, model = make_stack(), MODELS[kind]()
    publisher, replica = publisher_of(stack, "bfloat16"), WeightCopy(tmp_path / "replica")
    replica.open()
    manifests = []
    for step in range(5):
        manifest = publisher.store.manifest(publisher.publish(model, step))
        staged = replica.stage(publisher.store, manifest, with_changes=step > 0)
        folder = replica.write(staged).folder
        assert folder is not None
        expected = expected_checksum(model, torch.bfloat16, tmp_path / str(step))
        assert expected == manifest.state_checksum == state_checksum(map_folder(folder)), step
        replica.adopt(staged)
        manifests.append(manifest)
        move(model, step)
    assert [manifest.form for manifest in manifests] == ["full", "sparse", "sparse", "full", "sparse"]
    assert min(len(manifest.files) for manifest in manifests) > 1
    again = WeightCopy(tmp_path / "another")  # which begins with a chain
    again.open()
    staged = again.stage(publisher.store, manifests[2], with_changes=False)
    assert staged.folder is not None
    assert state_checksum(map_folder(staged.folder)) == manifests[2].state_checksum


def published(publisher: WeightPublisher, version: int) -> Manifest:
    return publisher.store.manifest(version)


def test_an_engine_loads_several_files_and_patches_from_several(make_stack: MakeStack, tmp_path: Path) -> None:
    stack, model, engine = make_stack(), tiny_llama(), rounded_model(tiny_llama(seed=8))
    publisher, replica = publisher_of(stack, "bfloat16"), WeightCopy(tmp_path / "replica")
    replica.open()
    publisher.publish(model, 0)
    staged = replica.stage(publisher.store, published(publisher, 0), with_changes=False)
    assert staged.folder is not None
    apply_weights(engine, read_weights(engine, staged.folder))
    replica.adopt(staged)
    assert_equal_weights(dict(engine.state_dict()), rounded(model))
    move(model, 0)
    publisher.publish(model, 1)
    staged = replica.stage(publisher.store, published(publisher, 1), with_changes=True)
    assert staged.changes is not None
    apply_patches(engine, read_patches(staged.changes.file, module=engine))
    assert_equal_weights(dict(engine.state_dict()), rounded(model))


def rounded(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def test_float32_is_streamed_in_several_files(make_stack: MakeStack, tmp_path: Path) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = publisher_of(stack, "float32")
    store = WeightStore(stack.settings.weight_store_url)
    for step in range(2):
        manifest = store.manifest(publisher.publish(model, step))
        assert manifest.state_checksum == expected_checksum(model, torch.float32, tmp_path / f"saved-{step}")
        assert [file.name for file in manifest.files][:1] == [f"model-00001-of-{len(manifest.files):05d}.safetensors"]
        store.fetch(manifest, tmp_path / str(step))
        found = {name: t for file in (tmp_path / str(step)).iterdir() for name, t in load_file(file).items()}
        saved = load_file(tmp_path / f"saved-{step}" / "model.safetensors")
        assert_equal_weights(found, saved)
        move(model, step)


def test_an_update_that_grows_too_large_on_the_way_is_full(make_stack: MakeStack, tmp_path: Path) -> None:
    """Random bits do not compress: packing stops at the first tensors."""
    stack, model = make_stack(), tiny_llama()
    publisher = publisher_of(stack, "bfloat16")
    publisher.publish(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-(2**15), 2**15, parameter.shape, dtype=torch.int16).view(torch.bfloat16))
            parameter.nan_to_num_()
    publisher.publish(model, 1)
    move(model, 2)
    publisher.publish(model, 2)
    assert [published(publisher, version).form for version in range(3)] == ["full", "full", "sparse"]
    expected = expected_checksum(model, torch.bfloat16, tmp_path / "saved")
    assert published(publisher, 2).state_checksum == expected


def test_an_engine_that_keeps_experts_fused_loads_their_checkpoint(make_stack: MakeStack, tmp_path: Path) -> None:
    stack, model = make_stack(), MODELS["mixtral"]()
    engine = rounded_model(MODELS["mixtral"]())
    publisher = publisher_of(stack, "bfloat16")
    publisher.store.fetch(published(publisher, publisher.publish(model, 0)), tmp_path)
    apply_weights(engine, in_memory(engine, read_weights(engine, tmp_path)))
    assert_equal_weights(dict(engine.state_dict()), rounded(model))
