import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from shared.coordination import AnnouncedWeights
from shared.database import WeightVersionRow
from shared.errors import DatabaseRefusalError, WeightStoreError
from shared.redis import weights_key
from shared.retries import Retries
from shared.weights.checkpoint_names import untied_state
from shared.weights.patches import apply_patches, decode_patches
from shared.weights.state import BitTensor, parse_state, state_checksum
from shared.weights.store import FULL_FILE, SPARSE_FILE, WeightStore
from tests.shared.conftest import database_url, postgres_url
from tests.trainer.conftest import MakeStack, Stack, assert_equal_weights, tiny_llama
from trainer.publisher import WeightPublisher

__all__ = ["database_url", "postgres_url"]  # fixtures


def store_of(stack: Stack) -> WeightStore:
    return WeightStore(stack.settings.weight_store_url)


def version_rows(stack: Stack) -> list[tuple[int, int, str, int]]:
    """Version, step, form and bytes of each."""
    return [(row.version, row.step, row.form, row.num_bytes) for row in stack.rows(WeightVersionRow)]


def test_fetched_weights_load_into_a_fresh_model_equal(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack()
    publisher, model = stack.prepare_lead().publisher, tiny_llama(seed=3)
    version = publisher.publish(model, 7)
    manifest = store_of(stack).manifest(version)
    store_of(stack).fetch(manifest, tmp_path)
    fresh = tiny_llama(seed=5)
    tensors = load_file(tmp_path / "model.safetensors")
    assert fresh.load_state_dict(tensors, strict=False).missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert_equal_weights(fresh.state_dict(), model.state_dict())
    assert (version, manifest.step, stack.coordination.announced_version()) == (0, 7, 0)


REFUSALS = {
    "sqlite": "CREATE TRIGGER no BEFORE INSERT ON weight_versions BEGIN SELECT RAISE(ABORT, 'weight_versions'); END",
    "postgresql": "ALTER TABLE weight_versions ADD CHECK (num_bytes < 5)",
}


def test_a_version_whose_row_is_refused_stops_at_once_and_leaves_nothing(
    make_stack: MakeStack, database_url: str
) -> None:
    """Nor does the restart, which does the same again, leave a full version."""
    stack = make_stack(database_url=database_url)
    with stack.records.database.begin() as connection:
        connection.execute(sa.text(REFUSALS[connection.dialect.name]))
    for _ in range(2):
        with pytest.raises(DatabaseRefusalError, match="weight_versions"):
            stack.prepare_lead().publisher.publish(tiny_llama(), 0)
        assert store_of(stack).versions() == []
    assert stack.coordination.announced_version() is None


def test_a_version_whose_row_a_kill_prevented_gets_it_at_the_next_start(make_stack: MakeStack) -> None:
    stack = make_stack()
    publisher = stack.prepare_lead().publisher
    publisher.publish(tiny_llama(), 0)
    publisher.store.publish({FULL_FILE: b"x"}, version=1, step=1, epoch=publisher.epoch, state_checksum="")
    assert stack.prepare_lead().publisher.publish(tiny_llama(), 0) == 2
    assert [row[:2] for row in version_rows(stack)] == [(0, 0), (1, 1), (2, 0)]


def bfloat16_publisher(stack: Stack, *, full_every: int = 10, keep_versions: int = 3) -> WeightPublisher:
    changes = {"dtype": "bfloat16", "full_every": full_every, "keep_versions": keep_versions}
    return stack.with_settings("weights", **changes).prepare_lead().publisher


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


def test_sparse_versions_are_equal_to_the_full_form_to_the_last_bit(make_stack: MakeStack, tmp_path: Path) -> None:
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
    full, *sparse = version_rows(stack)
    assert (full[2], {row[2] for row in sparse}) == ("full", {"sparse"})
    assert max(row[3] for row in sparse) < 0.2 * full[3]


def test_every_nth_version_is_full_and_so_is_the_first_of_a_process(make_stack: MakeStack) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = bfloat16_publisher(stack, full_every=3, keep_versions=20)
    for step in range(5):
        publisher.publish(model, step)
    bfloat16_publisher(stack, full_every=3, keep_versions=20).publish(model, 5)
    assert forms(store_of(stack)) == ["full", "sparse", "sparse", "full", "sparse", "full"]


def test_a_version_is_full_where_the_changes_would_not_be_smaller(make_stack: MakeStack) -> None:
    """Random bits do not compress."""
    stack, model = make_stack(), tiny_llama()
    publisher = bfloat16_publisher(stack)
    for step in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                bits = torch.randint(-(2**15), 2**15, parameter.shape, dtype=torch.int16)
                parameter.copy_(bits.view(torch.bfloat16).nan_to_num())
        publisher.publish(model, step)
    assert forms(store_of(stack)) == ["full", "full"]


def test_float32_is_sent_whole_and_keeps_no_copy(make_stack: MakeStack) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = stack.prepare_lead().publisher
    for step in range(2):
        publisher.publish(model, step)
    assert forms(store_of(stack)) == ["full", "full"]
    assert publisher._published is None


def test_what_a_kept_version_rests_on_is_kept(make_stack: MakeStack, tmp_path: Path) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher, store = bfloat16_publisher(stack, full_every=4, keep_versions=2), store_of(stack)
    kept = []
    for step in range(7):
        publisher.publish(model, step)
        kept.append(store.versions())
        assembled(store, store.versions()[-1], tmp_path / str(step))
        nudge(model, 1e-5)
    assert kept[3:] == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [4, 5], [4, 5, 6]]


def test_old_versions_are_pruned_and_every_version_has_its_row(make_stack: MakeStack) -> None:
    stack = make_stack()
    publisher, store = stack.prepare_lead().publisher, store_of(stack)
    for step in range(5):
        publisher.publish(tiny_llama(), step)
    assert store.versions() == [2, 3, 4]
    rows = version_rows(stack)
    assert [row[:2] for row in rows] == [(step, step) for step in range(5)]
    assert [row[3] for row in rows[2:]] == [store.manifest(version).num_bytes for version in (2, 3, 4)]


def test_a_version_published_again_after_a_crash_replaces_its_row(make_stack: MakeStack, database_url: str) -> None:
    """The first publisher ended between row and announcement, and the store was emptied."""
    stack = make_stack(database_url=database_url)
    stack.prepare_lead().publisher.publish(tiny_llama(), 3)
    shutil.rmtree(stack.settings.weight_store_url)
    again = stack.prepare_lead().publisher
    again.version = -1
    again.publish(tiny_llama(), 5)
    assert [row[:2] for row in version_rows(stack)] == [(0, 5)]


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Meanwhile the system refuses, in the middle of a write, to make any file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_half_a_file_and_no_version(make_stack: MakeStack, tmp_path: Path) -> None:
    """Once there is room the same version is written whole."""
    stack = make_stack()
    publisher, store = stack.prepare_lead(Retries(max_attempts=2)).publisher, store_of(stack)
    refusal = r"version 0 can't be written.*free space or mend weights\.store"
    with room_for(10_000), pytest.raises(WeightStoreError, match=refusal):
        publisher.publish(tiny_llama(), 0)
    (half,) = Path(store.root).glob("v*/*")
    assert (half.name, half.stat().st_size) == (f"1.{FULL_FILE}", 10_000)
    assert (store.versions(), stack.coordination.announced_version()) == ([], None)
    assert publisher.publish(tiny_llama(), 0) == 0
    store.fetch(store.manifest(0), tmp_path)
    assert (tmp_path / FULL_FILE).stat().st_size > 10_000
    assert (store.versions(), stack.coordination.announced_version()) == ([0], 0)


def next_start(stack: Stack, checkpoint_version: int) -> tuple[int, str]:
    """Version and epoch of what a trainer that starts now publishes first."""
    publisher = stack.prepare_lead().publisher
    publisher.continue_after(checkpoint_version)
    version = publisher.publish(tiny_llama(), 0)
    assert stack.coordination.announced_weights() == AnnouncedWeights(version, publisher.epoch)
    assert store_of(stack).manifest(version).epoch == publisher.epoch
    return version, publisher.epoch


def test_an_ordinary_resume_goes_on_in_its_epoch(make_stack: MakeStack) -> None:
    """Also after a crash between the store and the announcement, and from an older checkpoint."""
    stack = make_stack()
    first, epoch = next_start(stack, -1)
    assert (first, len(epoch)) == (0, 32)
    assert next_start(stack, 0) == (1, epoch)
    stack.coordination.announce_weights(0, epoch=epoch)
    assert next_start(stack, -1) == (2, epoch)


def test_a_store_that_lacks_what_was_announced_begins_an_epoch(make_stack: MakeStack) -> None:
    """Wiped, or restored to an earlier state."""
    stack = make_stack()
    _, first = next_start(stack, 6)
    shutil.rmtree(store_of(stack).root)
    version, second = next_start(stack, -1)
    assert version == 8
    stack.coordination.announce_weights(11, epoch=second)
    version, third = next_start(stack, -1)
    assert (version, len({first, second, third})) == (12, 3)


def test_without_what_was_announced_an_epoch_begins(make_stack: MakeStack) -> None:
    """Redis was lost, so a replica may serve any version. The same if an earlier release announced without an epoch."""
    stack = make_stack()
    _, epoch = next_start(stack, -1)
    stack.client.delete(weights_key(stack.run))
    version, other = next_start(stack, 0)
    stack.client.set(weights_key(stack.run), version)
    assert stack.coordination.announced_weights() == AnnouncedWeights(1, "")
    _, third = next_start(stack, 0)
    assert len({epoch, other, third}) == 3


def test_versions_ascend_above_all_that_were_seen(make_stack: MakeStack) -> None:
    """By the announcement, the checkpoint or a live replica; one that serves 0 has loaded nothing."""
    stack = make_stack()
    stack.coordination.report_replica("fresh", 0, lifetime_s=30)
    assert next_start(stack, -1)[0] == 0
    stack.coordination.announce_weights(41)
    assert next_start(stack, 17)[0] == 42
    assert next_start(stack, 50)[0] == 51
    stack.coordination.report_replica("a", 60, lifetime_s=30)
    assert next_start(stack, 0)[0] == 61
