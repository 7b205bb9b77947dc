"""Two and three gloo processes against one: the same losses, gradients, weights, moments and checkpoints."""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.services.collector.processes import free_port
from tests.trainer.conftest import assert_equal_weights
from tests.trainer.sharded import CHECKPOINT_AT, Run, computed_in_bfloat16, settings_of
from trainer.checkpoint import Checkpoints
from trainer.ranks import Ranks

LONE = Ranks.join("cpu", {})
pytestmark = pytest.mark.slow


def start(size: int, folder: Path, checkpoints: Path, first: int) -> list[dict[str, Any]]:
    """What each rank but the last, which kills itself, found."""
    port = str(free_port())
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    command = [sys.executable, "-m", "tests.trainer.sharded", str(folder), str(checkpoints), str(first)]
    ranks = [
        subprocess.Popen(command, stderr=subprocess.PIPE, env=environment | {"RANK": str(rank)}) for rank in range(size)
    ]
    try:
        errors = [rank.communicate(timeout=150)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [*[0] * (size - 1), -9], "\n".join(errors)
    return [torch.load(folder / f"found-{size}-{rank}.pt") for rank in range(size - 1)]


@dataclass
class Answers:
    folder: Path
    one: dict[str, Any]
    two: dict[str, Any]
    three: dict[str, Any]
    """Resumed from the checkpoint of two ranks."""
    others_of_three: dict[str, Any]


@pytest.fixture(scope="module")
def answers(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("sharded")
    shutil.copytree(policy_folder, folder, dirs_exist_ok=True)
    one = Run(settings_of(folder), LONE, Checkpoints(folder / "one", keep=5, ranks=LONE), resume=False)
    alone = one.train(1) | {"rounded": one.weights(torch.bfloat16)}
    (two,) = start(2, folder, folder / "two", 1)
    three, others = start(3, folder, folder / "two", CHECKPOINT_AT + 1)
    return Answers(folder, alone, two, three, others)


def close(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, rtol: float = 1e-3, atol: float = 1e-5
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_six_steps_of_two_ranks_equal_those_of_one_process(answers: Answers) -> None:
    """Losses, gradient norms, weights and moments; the reference is refreshed after the second step."""
    one, two = answers.one, answers.two
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4)
    assert one["losses"][0] == pytest.approx(0.6931472)  # ln 2: the reference is the policy
    assert one["losses"][1] != pytest.approx(0.6931472, abs=1e-3)
    assert one["losses"][2] == pytest.approx(0.6931472)  # refreshed
    close(one["weights"], two["weights"])
    close(one["moments"], two["moments"])


def test_tied_weights_stay_tied_and_the_rounded_snapshot_of_two_ranks_is_that_of_one(answers: Answers) -> None:
    assert answers.two["tied"]
    assert "lm_head.weight" not in answers.two["weights"]
    assert {one.dtype for one in answers.two["rounded"].values()} == {torch.bfloat16}
    assert_equal_weights(
        {name: tensor.to(torch.bfloat16) for name, tensor in answers.two["weights"].items()}, answers.two["rounded"]
    )
    close(answers.one["rounded"], answers.two["rounded"], rtol=1e-2, atol=1e-4)


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_on_three(answers: Answers) -> None:
    checkpoints = Checkpoints(answers.folder / "two", keep=5, ranks=LONE)
    resumed = Run(settings_of(answers.folder), LONE, checkpoints, resume=True)
    found = resumed.train(CHECKPOINT_AT + 1)
    for other in (found, answers.three):
        assert other["losses"] == pytest.approx(answers.two["losses"][CHECKPOINT_AT:], rel=1e-5)
        close(answers.two["weights"], other["weights"])
        close(answers.two["moments"], other["moments"])


def test_a_checkpoint_of_one_process_resumes_to_the_bit_and_is_an_ordinary_model_like_that_of_two_ranks(
    answers: Answers,
) -> None:
    checkpoints = Checkpoints(answers.folder / "one", keep=5, ranks=LONE)
    resumed = Run(settings_of(answers.folder), LONE, checkpoints, resume=True)
    found = resumed.train(CHECKPOINT_AT + 1)
    assert found["losses"] == answers.one["losses"][CHECKPOINT_AT:]
    assert_equal_weights(answers.one["weights"], found["weights"])
    assert_equal_weights(answers.one["moments"], found["moments"])
    for part in ("policy", "reference"):
        folders = [answers.folder / name / f"step-{CHECKPOINT_AT:08d}" / part for name in ("one", "two")]
        one, two = (dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()) for folder in folders)
        close(one, two)


def test_masters_stay_in_float32_and_activation_checkpointing_changes_nothing_in_bfloat16(answers: Answers) -> None:
    alone = computed_in_bfloat16(answers.folder, LONE, Checkpoints(answers.folder / "none", keep=1, ranks=LONE))
    exact = answers.one
    for found in (alone, answers.two["bfloat16"]):
        for one in found.values():
            assert one["dtypes"] == {"torch.float32"}
            assert one["reference"] == {"torch.bfloat16"}
            assert one["loss"] == pytest.approx(exact["losses"][0], abs=0.02)
            assert one["norm"] == pytest.approx(exact["norms"][0], rel=0.05)
        assert found["recompute True"]["norm"] == pytest.approx(found["recompute False"]["norm"], rel=1e-3)


def test_control_goes_to_all_ranks_and_a_bad_gradient_or_folder_on_one_is_seen_by_all(answers: Answers) -> None:
    found = answers.three["many"]
    assert (found["broadcast"], found["any"], found["sum"]) == ({"from": 0}, (True, False), [3.0, 3.0])
    assert found["bad folder"].startswith("SettingsError: policy.model: ")
    assert not math.isfinite(found["norm"])
    other = answers.others_of_three["many"]
    assert str(other) == str(found)  # nan is not equal to itself


def test_a_killed_rank_is_named_by_all_others(answers: Answers) -> None:
    assert answers.two["killed"].startswith("rank 1 of 2 is gone")
    assert answers.three["killed"].startswith("rank 2 of 3 is gone")
    assert answers.others_of_three["killed"].startswith("rank 2 of 3 is gone")
