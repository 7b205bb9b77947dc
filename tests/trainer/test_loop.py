"""Whole runs in-process, on a real Redis and SQLite, with windows written straight to the stream."""

from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from shared.errors import SettingsError, TrainingError
from tests.trainer.conftest import Stack, assert_equal_weights
from tests.trainer.windows import plain_window
from trainer.figures import FIGURES
from trainer.loop import Trainer

MakeStack = Callable[..., Stack]


def test_a_run_trains_checkpoints_marks_and_acknowledges(make_stack: MakeStack) -> None:
    stack = make_stack(steps=3, pairs_per_step=4)
    stack.write_plain(range(4))  # 12 pairs
    stack.train()
    balance = stack.ledger.balance()
    assert (balance.read, balance.trained, balance.in_flight, stack.contradictions()) == (4, 4, 0, [])
    assert stack.stream.window_ids() == set()
    report = stack.coordination.trainer_report()
    assert report is not None
    assert (report.step, report.weight_version, report.state) == (3, 3, "finished")
    assert [row.weight_version for row in stack.rows()] == [1, 2, 3]


def test_figures_have_their_names_and_values(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, beta=0.1, log_tensorboard=True)
    stack.write_plain(range(2))
    stack.train()
    first, second = stack.figures()
    assert set(first) | set(second) <= set(FIGURES)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are equal before the first update
    assert (first["reward_margin"], first["reward_accuracy"], first["chosen_original_rate"]) == (0.0, 0.0, 1.0)
    assert second["reward_margin"] > 0.0
    assert second["loss"] < first["loss"]
    assert (first["reward_original"], first["reward_rollout"], first["pairs"]) == (1.0, 0.0, 3)
    assert "reward_rewrite" not in first
    assert (first["policy_lag_max"], second["policy_lag_max"]) == (0, 1)
    assert (first["windows"], first["seconds_rollout"], first["target_tokens"]) == (1, 0.5, 12 + 1 + 2 + 3)
    assert second["seconds_push"] > 0
    (events,) = (stack.settings.run.folder / "tensorboard").iterdir()
    assert b"reward_margin" in events.read_bytes()


@pytest.mark.parametrize("objective", ["rf_nll", "next_token", "sft_rollout"])
def test_nll_objectives_lower_the_loss_per_token(make_stack: MakeStack, objective: str) -> None:
    stack = make_stack(steps=6, objective=objective, pairs_per_step=3, learning_rate=0.02)
    window = plain_window(0, run=stack.run)
    stack.write(window.model_copy(update={"key": window.key.model_copy(update={"position": n})}) for n in range(6))
    stack.train()
    losses = [figures["loss"] for figures in stack.figures()]
    assert losses[-1] < losses[0] - 0.5


def test_micro_batches_do_not_change_the_update(make_stack: MakeStack) -> None:
    whole = make_stack("whole", steps=1, pairs_per_step=9)
    cut = make_stack("cut", steps=1, pairs_per_step=9, max_batch_tokens=1)
    for stack in (whole, cut):
        stack.write_plain(range(3))
        stack.train()
    for name, tensor in whole.weights_at(1).items():
        torch.testing.assert_close(tensor, cut.weights_at(1)[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_does_not_change_the_update(make_stack: MakeStack) -> None:
    plain = make_stack("plain", steps=2)
    saving = make_stack("saving", steps=2, activation_checkpointing=True)
    for stack in (plain, saving):
        stack.write_plain(range(3))
        stack.train()
    assert_equal_weights(plain.weights_at(2), saving.weights_at(2))


def test_the_same_command_again_says_finished_and_a_larger_one_continues(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write_plain(range(2))
    stack.train()
    version = stack.coordination.announced_version()
    stack.train()
    assert stack.coordination.announced_version() == version
    stack.with_trainer(steps=2).train()
    assert stack.coordination.announced_version() == 3  # 0 and 1, the republished 2, and 3 after step 2
    assert stack.ledger.balance().trained == 2


def test_the_end_of_the_source_makes_one_last_smaller_step(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=4)
    stack.write_plain(range(2))  # 6 pairs
    stack.end_source(max_epochs=0)
    stack.train()
    assert [figures["pairs"] for figures in stack.figures()] == [4, 2]
    report = stack.coordination.trainer_report()
    assert report is not None
    assert report.state == "finished"
    assert stack.ledger.balance().trained == 2


def test_the_end_of_fewer_epochs_is_not_the_end(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=3, stream_timeout_s=0.5)
    stack.write_plain([0])
    stack.end_source(max_epochs=2)
    with pytest.raises(TrainingError, match=r"no window arrived .* is a collector running"):
        stack.train()


def test_stop_ends_the_wait_with_a_checkpoint(make_stack: MakeStack) -> None:
    stack, stop = make_stack(steps=9, pairs_per_step=3), Event()
    stack.write_plain([0])
    timer = Timer(2.0, stop.set)
    timer.start()
    stack.train(stop)
    timer.join()
    assert stack.ledger.balance().trained == 1
    report = stack.coordination.trainer_report()
    assert report is not None
    assert (report.step, report.state) == (1, "training")


def fill_norm(trainer: Trainer, value: float) -> Callable[[], None]:
    """Makes every loss non-finite; the answer undoes it."""
    norm = trainer.policy.model.get_parameter("model.norm.weight").data
    good = norm.clone()
    norm.fill_(value)

    def mend() -> None:
        norm.copy_(good)

    return mend


def test_a_non_finite_loss_is_skipped_and_training_continues(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, checkpoint_every=1)
    stack.write_plain(range(3))
    trainer = stack.prepare()
    mend = fill_norm(trainer, float("nan"))
    trainer.take_step(trainer.next_pairs())
    assert (trainer.step, trainer.bad_steps) == (0, 1)
    mend()
    trainer.run()
    assert stack.ledger.balance().dropped == {"non_finite_loss": 1}
    assert (stack.ledger.balance().trained, stack.ledger.balance().in_flight) == (2, 0)
    assert stack.figures()[0]["skipped_steps"] == 1
    assert stack.contradictions() == []


def test_pairs_of_a_skipped_step_are_told_apart(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=4)
    stack.write_plain(range(3))
    trainer = stack.prepare()
    mend = fill_norm(trainer, float("nan"))
    trainer.take_step(trainer.next_pairs())  # three pairs of the first window, one of the second
    mend()
    trainer.run()
    assert trainer.last is not None
    finished = trainer.last.finished
    assert (finished["0.0.0.0"].pairs_by_step, finished["0.0.0.0"].num_skipped) == ({}, 3)
    assert (finished["0.0.1.0"].pairs_by_step, finished["0.0.1.0"].num_skipped) == ({1: 2}, 1)
    assert stack.contradictions() == []


def test_non_finite_losses_in_a_row_stop_the_run_with_the_checkpoint_intact(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write_plain(range(4))
    stack.train()
    before = stack.weights_at(1)
    trainer = stack.with_trainer(steps=9, max_bad_steps=2).prepare()
    fill_norm(trainer, float("inf"))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.run()
    assert_equal_weights(stack.weights_at(1), before)
    assert (stack.ledger.balance().trained, stack.ledger.balance().in_flight) == (1, 3)


def test_a_missing_model_is_named(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack().with_section("run", {"name": "another"})
    with pytest.raises(SettingsError, match=r"policy.model: .*nowhere"):
        stack.with_section("policy", {"model": str(tmp_path / "nowhere")}).train()


def test_another_identity_is_refused(make_stack: MakeStack) -> None:
    stack = make_stack(objective="dpo")
    with pytest.raises(SettingsError, match=r"trainer\.objective was 'dpo' and is now 'rf_nll'"):
        stack.with_trainer(objective="rf_nll").train()
