from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from shared.checkpoint_state import CheckpointState
from shared.errors import SettingsError, TrainingError
from shared.settings import Settings
from tests.trainer.conftest import Stack
from trainer.checkpoint import Checkpoints
from trainer.figures import WandbSink

STATE = CheckpointState(number=1, after=0, step=3, weight_version=3, finished={}, partial={})


def test_a_disk_that_refuses_leaves_earlier_checkpoints_and_nothing_half(
    make_stack: Callable[..., Stack], tmp_path: Path
) -> None:
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


def test_moments_of_another_model_are_refused(make_stack: Callable[..., Stack], tmp_path: Path) -> None:
    trainer, checkpoints = make_stack().prepare(), Checkpoints(tmp_path / "checkpoints", keep=1)
    for parameter in trainer.policy.model.parameters():
        parameter.grad = parameter.detach().clone()
    trainer.optimizer.step(1)
    checkpoints.write(STATE, trainer.policy, trainer.optimizer)
    checkpoint = checkpoints.newest()
    assert checkpoint is not None
    trainer.optimizer._parameters["another.weight"] = trainer.optimizer._parameters["model.norm.weight"]
    with pytest.raises(TrainingError, match=r"optimizer\.safetensors can't be used"):
        checkpoint.load_optimizer(trainer.optimizer)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_its_package_names_the_remedy() -> None:
    with pytest.raises(SettingsError, match="headwater\\[wandb\\]"):
        WandbSink(Settings())
