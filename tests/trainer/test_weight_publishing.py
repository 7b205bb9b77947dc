import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from shared.coordination import AnnouncedWeights
from shared.database import WeightVersionRow, transaction
from shared.errors import WeightStoreError
from shared.redis import weights_key
from shared.weights.patches import apply_patches, decode_patches
from shared.weights.state import BitTensor, parse_state, state_checksum
from shared.weights.store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.shared.conftest import database_url, postgres_url
from tests.trainer.conftest import Stack, tiny_llama
from trainer.publisher import WeightPublisher, untied_state

__all__ = ["database_url", "postgres_url"]  # fixtures


def store_of(stack: Stack) -> WeightStore:
    return WeightStore(stack.settings.weight_store_url)


def version_rows(stack: Stack) -> list[WeightVersionRow]:
    with transaction(stack.records.database) as session:
        rows = list(session.scalars(sa.select(WeightVersionRow).order_by(WeightVersionRow.version)))
        session.expunge_all()
    return rows


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


def bfloat16_publisher(stack: Stack, *, full_every: int = 10, keep_versions: int = 3) -> WeightPublisher:
    stack = stack.with_weights(dtype="bfloat16", full_every=full_every, keep_versions=keep_versions)
    return stack.prepare().publisher


def forms(store: WeightStore) -> list[str]:
    return [store.manifest(version).form for version in store.versions()]


def assembled(store: WeightStore, version: int, folder: Path) -> dict[str, BitTensor]:
    """What a replica makes of a version: the last full one and all changes since."""
    full, *links = store.chain(version)
    store.fetch(full, folder)
    state = parse_state((folder / FULL_FILE).read_bytes(), where="full")
    state = {name: replace(tensor, bits=tensor.bits.copy()) for name, tensor in state.items()}
    for link in links:
        store.fetch(link, folder)
        apply_patches(state, decode_patches((folder / SPARSE_FILE).read_bytes(), state, where="link"))
    return state


def nudge(model: LlamaForCausalLM, size: float) -> None:
    """A step of about `size` on every element."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            torch.manual_seed(number)
            parameter.add_(torch.randn_like(parameter).sign(), alpha=size)


def test_sparse_versions_are_equal_to_the_full_form_to_the_last_bit(
    make_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    """Tied weights among them: the head goes with the embedding."""
    stack, model = make_stack(), tiny_llama(tie=True)
    publisher, store = bfloat16_publisher(stack), store_of(stack)
    for step in range(4):
        version = publisher.publish(model, step)
        state = assembled(store, version, tmp_path / str(step))
        expected = {name: tensor.to(torch.bfloat16) for name, tensor in untied_state(model).items()}
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(torch.from_numpy(state[name].bits.view("i2")), tensor.view(torch.int16).reshape(-1))
        assert store.manifest(version).state_checksum == state_checksum(state)
        nudge(model, 1e-5)
    assert forms(store) == ["full", "sparse", "sparse", "sparse"]
    rows = [(row.form, row.num_bytes) for row in version_rows(stack)]
    assert [form for form, _ in rows] == ["full", "sparse", "sparse", "sparse"]
    assert max(size for form, size in rows if form == "sparse") < 0.2 * rows[0][1]


def test_every_nth_version_is_full_and_so_is_the_first_of_a_process(make_stack: Callable[..., Stack]) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = bfloat16_publisher(stack, full_every=3, keep_versions=20)
    for step in range(5):
        publisher.publish(model, step)
    bfloat16_publisher(stack, full_every=3, keep_versions=20).publish(model, 5)
    assert forms(store_of(stack)) == ["full", "sparse", "sparse", "full", "sparse", "full"]


def test_a_version_is_full_where_the_changes_would_not_be_smaller(make_stack: Callable[..., Stack]) -> None:
    """Bits at random have no order that changes could be told in more briefly."""
    stack, publisher = make_stack(), bfloat16_publisher(make_stack())
    for step in range(2):
        bits = torch.randint(-(2**15), 2**15, (100_000,), dtype=torch.int16)
        publisher.publish(torch.nn.ParameterDict({"x": bits.view(torch.bfloat16)}), step)  # type: ignore[arg-type]
    assert forms(store_of(stack)) == ["full", "full"]


def test_float32_is_sent_whole_and_keeps_no_copy(make_stack: Callable[..., Stack]) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = stack.prepare().publisher
    for step in range(2):
        publisher.publish(model, step)
    assert forms(store_of(stack)) == ["full", "full"]
    assert publisher._last is None


def test_what_a_kept_version_rests_on_is_kept(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher, store = bfloat16_publisher(stack, full_every=4, keep_versions=2), store_of(stack)
    kept = []
    for step in range(7):
        publisher.publish(model, step)
        kept.append(store.versions())
        assembled(store, store.versions()[-1], tmp_path / str(step))
        nudge(model, 1e-5)
    assert kept[3:] == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [4, 5], [4, 5, 6]]


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


def test_old_versions_are_pruned_and_every_version_has_its_row(
    make_stack: Callable[..., Stack], database_url: str
) -> None:
    stack = make_stack(database_url=database_url)
    trainer = stack.prepare()
    for step in range(5):
        trainer.publisher.publish(trainer.policy.model, step)
    assert store_of(stack).versions() == [2, 3, 4]
    sizes = {version: store_of(stack).manifest(version).num_bytes for version in (2, 3, 4)}
    rows = version_rows(stack)
    assert [(row.run_id, row.version, row.step) for row in rows] == [(stack.run, step, step) for step in range(5)]
    assert {row.version: row.num_bytes for row in rows[2:]} == sizes


def test_a_version_that_is_published_again_after_a_crash_replaces_its_row(
    make_stack: Callable[..., Stack], database_url: str
) -> None:
    """Its first publisher ended between the row and the announcement, and the store was emptied."""
    stack = make_stack(database_url=database_url)
    stack.prepare().publisher.publish(tiny_llama(), 3)
    shutil.rmtree(stack.settings.weight_store_url)
    again = stack.prepare().publisher
    again.version = -1
    again.publish(tiny_llama(), 5)
    assert [(row.version, row.step) for row in version_rows(stack)] == [(0, 5)]


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


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Meanwhile the system refuses to write on behind that many bytes of any file, in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_half_a_file_and_no_version(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    """Once there is room the same number is written again, whole."""
    stack = make_stack()
    trainer, store = stack.prepare(), store_of(stack)
    with room_for(10_000), pytest.raises(WeightStoreError, match=r"free space or mend weights\.store"):
        trainer.publisher.publish(trainer.policy.model, 0)
    (half,) = Path(store.root).glob("v*/*")
    assert (half.name, half.stat().st_size) == (FULL_FILE, 10_000)
    assert (store.versions(), stack.coordination.announced_version()) == ([], None)
    assert trainer.publisher.publish(trainer.policy.model, 0) == 0
    store.fetch(store.manifest(0), tmp_path)
    assert (tmp_path / FULL_FILE).stat().st_size > 10_000
    assert (store.versions(), stack.coordination.announced_version()) == ([0], 0)


def next_start(stack: Stack, checkpoint_version: int) -> tuple[int, str]:
    """Version and epoch of what a trainer that starts now publishes first."""
    publisher = stack.prepare().publisher
    publisher.continue_after(checkpoint_version)
    version = publisher.publish(tiny_llama(), 0)
    assert stack.coordination.announced_weights() == AnnouncedWeights(version, publisher.epoch)
    assert store_of(stack).manifest(version).epoch == publisher.epoch
    return version, publisher.epoch


def test_an_ordinary_resume_goes_on_in_its_epoch(make_stack: Callable[..., Stack]) -> None:
    """Also after a crash between the store and the announcement, and from an older checkpoint."""
    stack = make_stack()
    first, epoch = next_start(stack, -1)
    assert (first, len(epoch)) == (0, 32)
    assert next_start(stack, 0) == (1, epoch)
    stack.coordination.announce_weights(0, epoch=epoch)
    assert next_start(stack, -1) == (2, epoch)


def test_a_wiped_store_begins_an_epoch(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    _, epoch = next_start(stack, 6)
    shutil.rmtree(store_of(stack).root)
    version, other = next_start(stack, -1)
    assert version == 8
    assert other != epoch


def test_a_store_put_back_to_before_what_was_announced_begins_an_epoch(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack()
    _, epoch = next_start(stack, -1)
    stack.coordination.announce_weights(5, epoch=epoch)
    version, other = next_start(stack, -1)
    assert version == 6
    assert other != epoch


def test_without_what_was_announced_an_epoch_begins(make_stack: Callable[..., Stack]) -> None:
    """Redis was lost: a replica may serve any number. Announced without an epoch, by an earlier release: the same."""
    stack = make_stack()
    _, epoch = next_start(stack, -1)
    stack.coordination._client.delete(weights_key(stack.run))
    version, other = next_start(stack, 0)
    stack.coordination._client.set(weights_key(stack.run), version)
    assert stack.coordination.announced_weights() == AnnouncedWeights(1, "")
    _, third = next_start(stack, 0)
    assert len({epoch, other, third}) == 3


def test_versions_ascend_above_what_a_living_replica_serves(make_stack: Callable[..., Stack]) -> None:
    """Everything was put back to an earlier state, but for the replica. One that serves 0 has loaded nothing."""
    stack = make_stack()
    stack.coordination.report_replica("fresh", 0, lifetime_s=30)
    assert next_start(stack, -1)[0] == 0
    stack.coordination.report_replica("a", 41, lifetime_s=30)
    assert next_start(stack, 0)[0] == 42
