import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file

from shared.database import WeightVersionRow, transaction
from shared.errors import WeightStoreError
from shared.weight_store import WeightStore
from tests.trainer.conftest import Stack, tiny_llama
from trainer.weights import untied_state


def store_of(stack: Stack) -> WeightStore:
    return WeightStore(stack.settings.weight_store_url)


def test_fetched_weights_load_into_a_fresh_model_equal(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    stack = make_stack()
    trainer = stack.prepare()
    version = trainer.publisher.publish(trainer.policy.model, 7)
    manifest = store_of(stack).manifest(version)
    store_of(stack).fetch(manifest, tmp_path)
    fresh = tiny_llama(seed=5)
    tensors = load_file(tmp_path / "model.safetensors")
    assert fresh.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.state_dict().values(), trainer.policy.model.state_dict().values(), strict=True)
    )
    assert (version, manifest.step, stack.coordination.announced_version()) == (0, 7, 0)


def test_names_are_those_that_save_pretrained_writes(tmp_path: Path) -> None:
    for tie in (True, False):
        model = tiny_llama(tie=tie)
        model.save_pretrained(tmp_path)
        assert untied_state(model).keys() == load_file(tmp_path / "model.safetensors").keys()


def test_versions_ascend_above_store_announcement_and_checkpoint(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    publisher = stack.prepare().publisher
    stack.coordination.announce_weights(41)
    publisher.continue_after(17)
    assert publisher.publish(tiny_llama(), 0) == 42
    publisher.continue_after(50)
    assert publisher.publish(tiny_llama(), 0) == 51


def test_old_versions_are_pruned_and_every_version_has_its_row(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    trainer = stack.prepare()
    for step in range(5):
        trainer.publisher.publish(trainer.policy.model, step)
    assert store_of(stack).versions() == [2, 3, 4]
    with transaction(stack.ledger.engine) as session:
        rows = session.scalars(sa.select(WeightVersionRow).order_by(WeightVersionRow.version)).all()
        assert [(row.version, row.step) for row in rows] == [(version, version) for version in range(5)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_store_that_refuses_is_a_clear_error_and_announces_nothing(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    trainer = stack.prepare()
    folder = Path(stack.settings.weight_store_url)
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    with pytest.raises(WeightStoreError, match=r"version 0 .* can't be written"):
        trainer.publisher.publish(trainer.policy.model, 0)
    assert stack.coordination.announced_version() is None


def test_a_full_disk_leaves_no_complete_version(make_stack: Callable[..., Stack]) -> None:
    """The store's root is a file: every write below it fails as on a broken disk."""
    stack = make_stack()
    trainer = stack.prepare()
    Path(stack.settings.weight_store_url).write_text("in the way")
    with pytest.raises(WeightStoreError, match=r"free space or mend weights\.store"):
        trainer.publisher.publish(trainer.policy.model, 0)
    assert stack.coordination.announced_version() is None
