"""Whole runs in-process, on a real Redis and SQLite, with windows written straight to the stream."""

import math
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from shared.database import WeightVersionRow
from shared.errors import SettingsError, TrainingError, WeightStoreError
from shared.weights.store import WeightStore
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, assert_equal_weights
from tests.trainer.windows import plain_window
from trainer.checkpoint import Checkpoints
from trainer.figures import FIGURES
from trainer.lead import Order
from trainer.loop import Trainer


def test_a_run_trains_checkpoints_marks_and_acknowledges(make_stack: MakeStack) -> None:
    stack = make_stack(steps=3, pairs_per_step=4)
    stack.write_plain(range(6))  # of three pairs: two make a step
    stack.train()
    assert (stack.counts(), stack.stream.window_ids(), stack.contradictions()) == ((6, {}, 0), set(), [])
    step, version, state = stack.report()
    assert (step, version, state) == (3, stack.coordination.announced_version(), "finished")
    versions = stack.rows(WeightVersionRow)
    assert (versions[0].step, versions[-1].step, versions[-1].version) == (0, 3, version)


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
    assert second["seconds_wait_publish"] > 0
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


@pytest.mark.parametrize(("option", "tolerance"), [("max_batch_tokens", 1e-3), ("activation_checkpointing", 0.0)])
def test_what_saves_memory_does_not_change_the_update(make_stack: MakeStack, option: str, tolerance: float) -> None:
    plain, saving = (make_stack(f"{len(one)}", steps=1, pairs_per_step=9, **one) for one in ({}, {option: 1}))
    for stack in (plain, saving):
        stack.write_plain(range(3))
        stack.train()
    torch.testing.assert_close(saving.weights_at(1), plain.weights_at(1), rtol=tolerance, atol=tolerance / 10)


SWITCHES: list[dict[str, Any]] = [
    {"compute_dtype": "bfloat16"},
    {"compute_dtype": "bfloat16", "activation_checkpointing": True, "reference_dtype": "float32"},
    {"layout": "tree", "attention": "dense"},
    {"layout": "separate"},
    {"dpo_loss": "ipo"},
    {"label_smoothing": 0.1, "nll_weight": 0.5, "length_normalised": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(switches))
def test_with_every_switch_it_trains_publishes_and_resumes(make_stack: MakeStack, switches: dict[str, Any]) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, refresh_reference_every=2, **switches)
    stack.write_plain(range(4))
    stack.train()
    stack.with_settings("trainer", steps=4).train()
    assert all(math.isfinite(figures["loss"]) for figures in stack.figures())
    assert (len(stack.figures()), stack.counts(), stack.contradictions()) == (4, (4, {}, 0), [])
    (newest, *_) = sorted(stack.rows(WeightVersionRow), key=lambda row: -row.version)
    assert newest.step == 4


def test_the_same_command_again_says_finished_and_a_larger_one_continues(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write_plain(range(2))
    stack.train()
    version = stack.coordination.announced_version()
    stack.train()
    assert stack.coordination.announced_version() == version
    stack.with_settings("trainer", steps=2).train()
    assert stack.coordination.announced_version() == 3  # 0 and 1, the republished 2, and 3 after step 2
    assert stack.counts()[0] == 2


def test_the_end_of_the_source_makes_one_last_smaller_step(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=4)
    stack.write_plain(range(3))  # 9 pairs
    stack.end_source(max_epochs=0)
    stack.train()
    assert [figures["pairs"] for figures in stack.figures()] == [6, 3]
    assert (stack.report()[2], stack.counts(), stack.contradictions()) == ("finished", (3, {}, 0), [])


def test_the_end_of_fewer_epochs_is_not_the_end(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=3, stream_timeout_s=0.5)
    stack.write_plain([0])
    stack.end_source(max_epochs=2)
    with pytest.raises(TrainingError, match=r"no window arrived .* is a collector running"):
        stack.train()


def test_stop_ends_the_wait_with_a_checkpoint(make_stack: MakeStack) -> None:
    stack, stop = make_stack(steps=9, pairs_per_step=3), Event()
    stack.write_plain([0])
    thread = Thread(target=stack.train, args=[stop])
    thread.start()
    wait_until(lambda: bool(stack.coordination.trainer_report() and stack.report()[0]), what="step 1")
    stop.set()
    thread.join()
    assert (stack.counts()[0], stack.report()[0], stack.report()[2]) == (1, 1, "training")


def next_step(trainer: Trainer) -> Order:
    """The first order with passes."""
    while not (order := trainer.next_order()).plans:
        assert not order.ends
        if order.publishes:
            trainer.publisher.begin(trainer.policy.model, trainer.step)
    return order


def skip_a_step(trainer: Trainer) -> None:
    """Takes the next windows with a loss that is not finite."""
    norm = trainer.policy.model.get_parameter("model.norm.weight").data
    good = norm.clone()
    norm.fill_(float("nan"))
    trainer.take_step(next_step(trainer))
    norm.copy_(good)


def test_a_non_finite_loss_is_skipped_and_training_continues(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, checkpoint_every=1)
    stack.write_plain(range(3))
    trainer = stack.prepare()
    skip_a_step(trainer)
    assert (trainer.step, trainer.bad_steps) == (0, 1)
    assert (stack.counts(), stack.contradictions()) == ((0, {"non_finite_loss": 1}, 2), [])
    trainer.run()
    assert (stack.counts(), stack.contradictions()) == ((2, {"non_finite_loss": 1}, 0), [])
    assert stack.figures()[0]["skipped_steps"] == 1


def test_a_run_whose_last_step_was_skipped_leaves_nothing_pending(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=3, checkpoint_every=1)
    stack.write_plain(range(2))
    stack.end_source(max_epochs=0)
    trainer = stack.prepare()
    trainer.take_step(next_step(trainer))
    skip_a_step(trainer)
    trainer.run()
    assert (stack.counts(), stack.stream.window_ids()) == ((1, {"non_finite_loss": 1}, 0), set())


def test_non_finite_losses_in_a_row_stop_the_run_with_the_checkpoint_intact(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write_plain(range(4))
    stack.train()
    before = stack.weights_at(1)
    trainer = stack.with_settings("trainer", steps=9, max_bad_steps=2).prepare()
    trainer.policy.model.get_parameter("model.norm.weight").data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.run()
    assert_equal_weights(stack.weights_at(1), before)
    assert stack.counts() == (1, {"non_finite_loss": 2}, 1)


def test_an_error_beside_a_checkpoint_in_the_making_costs_no_step(
    make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = make_stack(steps=9, pairs_per_step=3, checkpoint_every=2)
    stack.write_plain(range(9))
    trainer, complete, begin = stack.prepare(), Checkpoints._complete, WeightStore.begin

    def complete_slowly(*arguments: Any) -> None:
        time.sleep(0.5)
        complete(*arguments)

    def begin_until_step_2(store: WeightStore, version: int, *, step: int, **options: Any) -> Any:
        if step >= 2:
            raise WeightStoreError("refused")
        return begin(store, version, step=step, **options)

    monkeypatch.setattr(Checkpoints, "_complete", complete_slowly)
    monkeypatch.setattr(WeightStore, "begin", begin_until_step_2)
    with pytest.raises(WeightStoreError, match="refused"):
        trainer.run()
    assert trainer.step in (2, 3)
    assert (stack.checkpoints / f"step-{trainer.step:08d}/state.json").is_file()


def test_a_missing_model_is_named(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack().with_settings("run", name="another")
    with pytest.raises(SettingsError, match=r"policy.model: .*nowhere"):
        stack.with_settings("policy", model=str(tmp_path / "nowhere")).train()


def test_another_identity_is_refused(make_stack: MakeStack) -> None:
    stack = make_stack(objective="dpo")
    with pytest.raises(SettingsError, match=r"trainer\.objective was 'dpo' and is now 'rf_nll'"):
        stack.with_settings("trainer", objective="rf_nll").train()
