"""Checkpoints on disk, and the evidence that each leaves in finished.jsonl."""

from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.checkpoint_state import CheckpointState, EvidenceFile
from shared.database import WindowRow
from shared.errors import SettingsError, TrainingError
from shared.settings import Settings
from tests.trainer.conftest import MakeStack
from trainer.checkpoint import Checkpoints
from trainer.figures import WandbSink

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
    checkpoints = Checkpoints(root, keep=2)
    checkpoints.write(STATE, trainer.policy, trainer.optimizer)
    (root / "step-00000004").mkdir()
    (root / "step-00000004" / "in-the-way").write_text("the rename on top of a full folder fails")
    with pytest.raises(TrainingError, match="earlier ones are intact"):
        checkpoints.write(STATE.model_copy(update={"step": 4}), trainer.policy, trainer.optimizer)
    assert not list(root.glob("*.tmp"))
    assert (root / "step-00000003/state.json").is_file()


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000007.tmp").mkdir()
    assert Checkpoints(tmp_path, keep=1).newest() is None
    assert Checkpoints(tmp_path / "absent", keep=1).newest() is None


def test_moments_of_another_model_are_refused(make_stack: MakeStack, tmp_path: Path) -> None:
    trainer, checkpoints = make_stack().prepare(), Checkpoints(tmp_path / "checkpoints", keep=1)
    _, *others = trainer.policy.model.parameters()  # the moments of the first will be missing
    for parameter in others:
        parameter.grad = parameter.detach().clone()
    trainer.optimizer.step(1)
    checkpoints.write(STATE, trainer.policy, trainer.optimizer)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors can't be used"):
        checkpoint.load_optimizer(trainer.optimizer)


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
    """Three pairs a window, steps of at least four: two windows a step, the fifth is left."""
    stack = make_stack(steps=2, pairs_per_step=4, checkpoint_every=1, keep_checkpoints=1)
    stack.write_plain(range(5))
    stack.train()
    (first, second), damaged = EvidenceFile(stack.checkpoints / "finished.jsonl").read()
    assert not damaged
    assert (first.number, first.after, first.step) == (1, 0, 1)
    assert (second.number, second.after, second.step) == (2, 1, 2)
    assert {name: (one.step, one.num_pairs) for name, one in first.finished.items()} == {
        "0.0.0.0": (1, 3),
        "0.0.1.0": (1, 3),
    }
    assert {name: (one.step, one.num_pairs) for name, one in second.finished.items()} == {
        "0.0.2.0": (2, 3),
        "0.0.3.0": (2, 3),
    }
    assert [row.num_pairs for row in stack.rows(WindowRow)] == [3, 3, 3, 3, None]


def test_a_checkpoint_that_was_not_settled_is_settled_at_the_next_start_though_another_followed(
    make_stack: MakeStack,
) -> None:
    """Neither is told to ledger and stream."""
    stack = make_stack(steps=2, pairs_per_step=3, checkpoint_every=1)
    stack.write_plain(range(3))
    trainer = stack.prepare()
    with patch("trainer.inbox.commit_finished", lambda *_: None):
        trainer.run()
    assert stack.counts() == (0, {}, 3)
    stack.with_settings("trainer", steps=3).train()
    assert (stack.counts(), stack.stream.window_ids(), stack.contradictions()) == ((3, {}, 0), set(), [])
    assert [row.trained_step for row in stack.rows(WindowRow)] == [1, 2, 3]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package_names_the_remedy() -> None:
    with pytest.raises(SettingsError, match="headwater\\[wandb\\]"):
        WandbSink(Settings())
