"""Checkpoints on disk, and the evidence that each leaves in finished.jsonl."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.checkpoint_state import CheckpointState, EvidenceFile
from shared.database import WindowRow
from shared.errors import DatabaseError, FencedError, SettingsError, TrainingError
from shared.settings import Settings, TrainerSettings
from tests.trainer.conftest import MakeStack, assert_equal_weights, tiny_llama
from trainer.checkpoint import Checkpoints
from trainer.figures import WandbSink
from trainer.model_folder import ModelFolder
from trainer.optimizer import PolicyOptimizer
from trainer.publication import layouts_of
from trainer.ranks import Ranks
from trainer.snapshot import Snapshot

LONE = Ranks.join("cpu", {})
STATE = CheckpointState(number=1, after=0, step=3, weight_version=3, finished={})


def test_a_checkpoint_loads_as_an_ordinary_model_and_once_damaged_is_an_error_not_a_step_back(
    make_stack: MakeStack,
) -> None:
    stack = make_stack(steps=1)
    stack.write_plain(range(2))
    stack.train()
    folder = stack.checkpoints / "step-00000001"
    assert AutoModelForCausalLM.from_pretrained(folder / "policy").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder / "policy")("w3 w4").input_ids == [3, 4]
    (folder / "state.json").write_text("{")
    with pytest.raises(TrainingError, match="restore the checkpoint"):
        stack.train()


def test_a_disk_that_refuses_leaves_earlier_checkpoints_and_nothing_half(make_stack: MakeStack, tmp_path: Path) -> None:
    trainer, root = make_stack().prepare(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(root, keep=2, ranks=LONE)
    checkpoints.begin(STATE, trainer.policy, trainer.optimizer)
    checkpoints.wait()
    (root / "step-00000004").mkdir()
    (root / "step-00000004" / "in-the-way").write_text("the rename on top of a full folder fails")
    checkpoints.begin(STATE.model_copy(update={"step": 4}), trainer.policy, trainer.optimizer)
    with pytest.raises(TrainingError, match="earlier ones are intact"):
        checkpoints.wait()
    assert not list(root.glob("*.tmp"))
    assert (root / "step-00000003/state.json").is_file()


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1, ranks=LONE)
    assert checkpoints.newest() is None
    assert Checkpoints(tmp_path / "absent", keep=1, ranks=LONE).newest() is None
    checkpoints.clear_unfinished()
    assert not list(tmp_path.iterdir())


def test_what_is_being_deleted_can_no_longer_become_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced trainer wakes right before its rename, while its successor deletes."""
    unfinished, delete, woke = tmp_path / "step-00000007.ab.tmp", shutil.rmtree, Event()

    def wake_and_delete(path: Path, *, ignore_errors: bool) -> None:
        woke.set()
        with pytest.raises(FileNotFoundError):
            unfinished.rename(tmp_path / "step-00000007")
        delete(path, ignore_errors=ignore_errors)

    (unfinished / "policy").mkdir(parents=True)
    monkeypatch.setattr("trainer.checkpoint.shutil.rmtree", wake_and_delete)
    Checkpoints(tmp_path, keep=1, ranks=LONE).clear_unfinished()
    assert woke.is_set()
    assert not list(tmp_path.iterdir())


def test_parameters_that_never_had_a_gradient_resume_without_moments_and_those_of_another_model_are_refused(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    trainer = make_stack().prepare()
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, ranks=LONE)
    untouched, *others = trainer.policy.model.parameters()
    for parameter in others:
        parameter.grad = parameter.detach().clone()
    trainer.optimizer.step(1)
    checkpoints.begin(STATE, trainer.policy, trainer.optimizer)
    checkpoints.wait()
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    resumed = PolicyOptimizer(trainer.policy.model, TrainerSettings())
    checkpoint.load_optimizer(resumed, LONE)
    assert_equal_weights(trainer.optimizer.state(), resumed.state())
    assert len(resumed.state()) == 3 * len(others)
    del untouched
    with pytest.raises(TrainingError, match="optimizer can't be used: moments of another model"):
        checkpoint.load_optimizer(PolicyOptimizer(torch.nn.Linear(2, 2), TrainerSettings()), LONE)


def test_one_that_lost_its_lease_leaves_no_checkpoint_and_no_evidence(make_stack: MakeStack, tmp_path: Path) -> None:
    def refuse() -> None:
        raise FencedError("another trainer has taken over")

    trainer, root = make_stack().prepare(), tmp_path / "checkpoints"
    checkpoints = Checkpoints(root, keep=1, ranks=LONE, confirm=refuse)
    checkpoints.begin(STATE, trainer.policy, trainer.optimizer)
    with pytest.raises(FencedError):
        checkpoints.wait()
    assert not list(root.iterdir())


def test_what_follows_a_checkpoint_finds_it_complete_and_its_error_is_the_loops(
    make_stack: MakeStack, tmp_path: Path
) -> None:
    trainer, root = make_stack().prepare(), tmp_path / "checkpoints"
    found: list[str] = []

    def then() -> None:
        found.extend(sorted(entry.name for entry in root.iterdir()))
        raise DatabaseError("the database is away")

    checkpoints = Checkpoints(root, keep=1, ranks=LONE)
    checkpoints.begin(STATE, trainer.policy, trainer.optimizer, then=then)
    with pytest.raises(DatabaseError, match="is away"):
        checkpoints.wait()
    assert found == ["finished.jsonl", "step-00000003"]
    checkpoints.wait()  # an error is raised once


def test_a_large_model_is_cut_into_files_with_an_index(tmp_path: Path) -> None:
    model, snapshot = tiny_llama(tie=False), Snapshot()
    snapshot.take(model)
    folder = replace(ModelFolder.of(model, None), max_file_bytes=4000)
    folder.write(tmp_path / "policy", layouts_of(snapshot), snapshot.tensors())
    assert len(list((tmp_path / "policy").glob("model-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert_equal_weights(dict(loaded.state_dict()), dict(model.state_dict()))


def test_older_checkpoints_and_half_written_ones_are_deleted_and_a_refreshed_reference_is_saved(
    make_stack: MakeStack,
) -> None:
    options = {"checkpoint_every": 1, "keep_checkpoints": 2, "refresh_reference_every": 3}
    stack = make_stack(steps=3, pairs_per_step=3, **options)
    stack.write_plain(range(3))
    (stack.checkpoints / "step-00000009.tmp").mkdir(parents=True)
    stack.train()
    found = sorted(entry.name for entry in stack.checkpoints.iterdir())
    assert found == ["finished.jsonl", "step-00000002", "step-00000003"]
    assert not (stack.checkpoints / "step-00000002/reference").exists()
    assert (stack.checkpoints / "step-00000003/reference/model.safetensors").is_file()


def test_evidence_says_which_update_contains_each_window_and_outlives_the_checkpoint(make_stack: MakeStack) -> None:
    """Windows of three pairs, steps of at least four: each takes two windows."""
    stack = make_stack(steps=2, pairs_per_step=4, checkpoint_every=1, keep_checkpoints=1)
    stack.write_plain(range(4))
    stack.train()
    (first, second), damaged = EvidenceFile(stack.checkpoints / "finished.jsonl").read()
    assert not damaged
    assert (first.number, first.after, first.step) == (1, 0, 1)
    assert (second.number, second.after, second.step) == (2, 1, 2)
    found = [{name: (one.step, one.num_pairs) for name, one in line.finished.items()} for line in (first, second)]
    assert found == [{"0.0.0.0": (1, 3), "0.0.1.0": (1, 3)}, {"0.0.2.0": (2, 3), "0.0.3.0": (2, 3)}]
    assert [(row.trained_step, row.num_pairs) for row in stack.rows(WindowRow)] == [(1, 3), (1, 3), (2, 3), (2, 3)]
    assert not (stack.checkpoints / "step-00000001").exists()


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package_names_the_remedy() -> None:
    with pytest.raises(SettingsError, match="headwater\\[wandb\\]"):
        WandbSink(Settings())
