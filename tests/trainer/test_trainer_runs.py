"""The loop in-process, on a real Redis and SQLite, with windows written straight to the stream."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import sqlalchemy as sa
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.database import StepRow, transaction
from shared.errors import SettingsError, StreamSchemaError, TrainingError
from shared.ledger import WindowStart
from shared.records import ScoredWindow
from shared.redis import window_ids_key
from shared.stream import SCHEMA, encode
from tests.trainer.conftest import Stack
from tests.trainer.windows import candidate, chunk, plain_window, window
from trainer.assembly import train
from trainer.figures import FIGURES
from trainer.loop import Trainer

MakeStack = Callable[..., Stack]


def documents_of(stack: Stack, numbers: Iterable[int], *, num_chunks: int = 3) -> list[ScoredWindow]:
    return [plain_window(number, num_chunks=num_chunks, run=stack.run) for number in numbers]


def rows_of(stack: Stack) -> list[StepRow]:
    with transaction(stack.records.database) as session:
        rows = list(session.scalars(sa.select(StepRow).order_by(StepRow.step)))
        session.expunge_all()
        return rows


def weights_at(stack: Stack, step: int) -> dict[str, torch.Tensor]:
    folder = stack.settings.run.folder / f"checkpoints/step-{step:08d}/policy"
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_trains_checkpoints_marks_and_acknowledges(make_stack: MakeStack) -> None:
    stack = make_stack(steps=3, pairs_per_step=4)
    stack.write(documents_of(stack, range(4)))  # 12 pairs
    train(stack.settings, Event())
    balance = stack.ledger.balance()
    assert (balance.read, balance.trained, balance.in_flight, stack.contradictions()) == (4, 4, 0, [])
    assert stack.stream.window_ids() == set()
    report = stack.coordination.trainer_report()
    assert report is not None
    assert (report.step, report.weight_version, report.state) == (3, 3, "finished")
    assert [row.weight_version for row in rows_of(stack)] == [1, 2, 3]


def test_a_checkpoint_loads_as_an_ordinary_model_with_its_tokenizer(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1)
    stack.write(documents_of(stack, range(2)))
    train(stack.settings, Event())
    folder = stack.settings.run.folder / "checkpoints/step-00000001/policy"
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder)("w3 w4").input_ids == [3, 4]


def test_figures_have_their_names_and_values(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, beta=0.1)
    stack.write(documents_of(stack, range(2)))
    train(stack.settings, Event())
    first, second = (row.figures for row in rows_of(stack))
    assert set(first) | set(second) <= set(FIGURES)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are equal before the first update
    assert (first["reward_margin"], first["reward_accuracy"], first["chosen_original_rate"]) == (0.0, 0.0, 1.0)
    assert second["reward_margin"] > 0.0
    assert second["loss"] < first["loss"]
    assert (first["reward_original"], first["reward_rollout"], first["pairs"]) == (1.0, 0.0, 3)
    assert "reward_rewrite" not in first
    assert (first["policy_lag_max"], second["policy_lag_max"]) == (0, 1)
    assert (first["seconds_rollout"], first["target_tokens"]) == (0.5, 12 + 1 + 2 + 3)
    assert second["seconds_push"] > 0


@pytest.mark.parametrize("objective", ["rf_nll", "next_token", "sft_rollout"])
def test_nll_objectives_lower_the_loss_per_token(make_stack: MakeStack, objective: str) -> None:
    stack = make_stack(steps=6, objective=objective, pairs_per_step=3, learning_rate=0.02)
    window = documents_of(stack, [0])[0]
    again = [window.model_copy(update={"key": window.key.model_copy(update={"position": n})}) for n in range(6)]
    stack.write(again)
    train(stack.settings, Event())
    losses = [row.figures["loss"] for row in rows_of(stack)]
    assert losses[-1] < losses[0] - 0.5


def test_micro_batches_do_not_change_the_update(make_stack: MakeStack) -> None:
    whole, cut = make_stack("whole", steps=1, pairs_per_step=9), make_stack("cut", steps=1, pairs_per_step=9)
    cut = cut.with_trainer(max_batch_tokens=1)
    for stack in (whole, cut):
        stack.write(documents_of(stack, range(3)))
        train(stack.settings, Event())
    for name, tensor in weights_at(whole, 1).items():
        torch.testing.assert_close(tensor, weights_at(cut, 1)[name], rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_does_not_change_the_update(make_stack: MakeStack) -> None:
    plain = make_stack("plain", steps=2)
    saving = make_stack("saving", steps=2, activation_checkpointing=True)
    for stack in (plain, saving):
        stack.write(documents_of(stack, range(3)))
        train(stack.settings, Event())
    assert_equal_weights(weights_at(plain, 2), weights_at(saving, 2))


def test_a_stale_document_is_dropped_counted_and_acknowledged(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, max_policy_lag=0)
    old, other = documents_of(stack, [0])[0], plain_window(1, version=0, run=stack.run)
    fresh = plain_window(2, version=1, run=stack.run)
    stack.write([old, other, fresh])
    train(stack.settings, Event())  # step 1 publishes version 1, which makes `other` stale
    assert stack.ledger.balance().dropped == {"stale": 1}
    assert stack.ledger.balance().trained == 2
    assert rows_of(stack)[1].figures["stale_windows"] == 1
    assert stack.stream.window_ids() == set()


def test_a_document_ahead_of_the_policy_is_dropped_counted_and_acknowledged(make_stack: MakeStack) -> None:
    """One rollout of a version that this trainer never published is enough: it is another policy's."""
    stack = make_stack(steps=1, pairs_per_step=3)
    own, ahead = plain_window(0, run=stack.run), plain_window(1, version=1, run=stack.run)
    mixed = ahead.model_copy(
        update={"key": own.key.model_copy(update={"position": 2}), "chunks": own.chunks[:1] + ahead.chunks[1:]}
    )
    stack.write([ahead, mixed, own])
    train(stack.settings, Event())
    assert stack.ledger.balance().dropped == {"newer_than_policy": 2}
    assert stack.ledger.balance().trained == 1
    assert rows_of(stack)[0].figures["policy_lag_max"] == 0
    assert stack.stream.window_ids() == set()


def test_a_document_that_comes_twice_is_trained_once(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3)
    first, second = documents_of(stack, range(2))
    stack.write([first])
    stack.stream._client.delete(window_ids_key(stack.run))  # or it would not be written again
    stack.stream.write(first)
    stack.write([second])
    train(stack.settings, Event())
    assert rows_of(stack)[1].figures["duplicate_windows"] == 1
    assert (stack.ledger.balance().trained, stack.stream.window_ids()) == (2, set())


def test_a_document_trained_before_the_checkpoint_is_acknowledged_not_trained(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    first, second = documents_of(stack, range(2))
    stack.write([first])
    train(stack.settings, Event())
    stack.stream.write(first)
    stack.write([second])
    train(stack.with_trainer(steps=2).settings, Event())
    assert rows_of(stack)[1].figures["duplicate_windows"] == 1
    assert stack.ledger.balance().trained == 2


def test_a_document_without_preference_is_dropped(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    tie = window(0, [chunk(4, [candidate("original", 1), candidate("rewrite", 2)], (0.5, 0.5))], run=stack.run)
    stack.write([tie, *documents_of(stack, [1])])
    train(stack.settings, Event())
    figures = rows_of(stack)[0].figures
    assert (figures["no_preference_windows"], figures["no_preference_chunks"]) == (1, 1)
    assert stack.ledger.balance().dropped == {"no_preference": 1}


def test_a_broken_entry_is_dropped_with_its_reason(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    broken, good = documents_of(stack, range(2))
    stack.write([broken])
    client = stack.stream._client
    key = stack.stream._key
    entry = client.xrange(key)[0][0]
    client.xdel(key, entry)
    client.xadd(key, {b"id": broken.window_id.encode(), b"schema": SCHEMA, b"body": b"\x00garbage"})
    stack.write([good])
    train(stack.settings, Event())
    assert (stack.ledger.balance().dropped, stack.contradictions()) == ({"broken_entry": 1}, [])


def test_an_entry_of_another_version_ends_the_trainer_and_stays_on_the_stream(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3)
    readable, foreign = documents_of(stack, range(2))
    stack.write([readable])
    stack.ledger.begin([WindowStart(foreign.key, foreign.source_id, 8)])
    fields = {b"id": foreign.window_id, b"schema": SCHEMA + 1, b"body": encode(foreign)}
    stack.stream._client.xadd(stack.stream._key, fields)
    with pytest.raises(StreamSchemaError, match=f"entries of schema {SCHEMA + 1} and this version reads"):
        train(stack.settings, Event())
    assert stack.ledger.balance().dropped == {}
    assert stack.stream.backlog().pending == 2


def test_a_document_in_the_middle_stays_pending_and_goes_on_where_it_was(make_stack: MakeStack) -> None:
    cut, whole = make_stack("cut", steps=1, pairs_per_step=4), make_stack("whole", steps=3, pairs_per_step=4)
    for stack in (cut, whole):
        stack.write(documents_of(stack, range(4)))
    train(cut.settings, Event())
    state = json.loads((cut.settings.run.folder / "checkpoints/step-00000001/state.json").read_text())
    assert state["partial"] == {"0.0.1.0": {"used": 1, "step": 1, "pairs_by_step": {"1": 1}}}
    assert cut.ledger.balance().trained == 1
    train(cut.with_trainer(steps=3).settings, Event())
    train(whole.settings, Event())
    assert cut.ledger.balance().trained == 4
    # the cosine of a 1-step run differs, so only what was trained can be compared, not the weights
    assert [r.figures["target_tokens"] for r in rows_of(cut)] == [r.figures["target_tokens"] for r in rows_of(whole)]


def test_a_resumed_run_ends_with_the_same_bits(make_stack: MakeStack) -> None:
    options = {"steps": 6, "pairs_per_step": 4, "checkpoint_every": 2, "refresh_reference_every": 2}
    whole, cut = make_stack("whole", **options), make_stack("cut", **options)
    for stack in (whole, cut):
        stack.write(documents_of(stack, range(8)))
    train(whole.settings, Event())
    stopped = cut.prepare()
    for _ in range(3):  # dies after step 3: the checkpoint of step 2 is the newest
        stopped.take_step(stopped._next_pairs())
        if stopped.step == 2:
            stopped._checkpoint()
    train(cut.settings, Event())
    assert_equal_weights(weights_at(whole, 6), weights_at(cut, 6))
    assert [row.step for row in rows_of(cut)] == [1, 2, 3, 4, 5, 6]
    assert (cut.ledger.balance().trained, cut.stream.window_ids()) == (8, set())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the trainer may catch it."""


def kill_at(trainer: Trainer, place: str) -> None:
    """Die in the moment before `place` is done, at step 4."""
    component, name = place.split(".")
    inbox = trainer.inbox
    owners = {"stream": inbox._stream, "ledger": inbox._ledger, "sinks": trainer.sinks[0]}
    owner = owners.get(component) or getattr(trainer, component)
    original = getattr(owner, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        if trainer.step == 4:
            raise Killed
        return original(*arguments, **options)

    setattr(owner, name, dying)


@pytest.mark.parametrize(
    "place",
    [
        "publisher._write",
        "publisher._record",
        "sinks.write",
        "coordination.report_trainer",
        "checkpoints.write",
        "checkpoints.keep_evidence",
        "ledger.mark_trained",
        "stream.acknowledge",
        "checkpoints.prune",
    ],
)
def test_wherever_it_is_killed_it_ends_with_the_same_bits(make_stack: MakeStack, place: str) -> None:
    options = {"steps": 6, "pairs_per_step": 4, "checkpoint_every": 2}
    whole, killed = make_stack("whole", **options), make_stack("killed", **options)
    for stack in (whole, killed):
        stack.write(documents_of(stack, range(8)))
    train(whole.settings, Event())
    trainer = killed.prepare()
    kill_at(trainer, place)
    with pytest.raises(Killed):
        trainer.run()
    assert killed.contradictions() == []
    train(killed.settings, Event())
    assert_equal_weights(weights_at(whole, 6), weights_at(killed, 6))
    assert [row.step for row in rows_of(killed)] == [1, 2, 3, 4, 5, 6]
    assert (killed.ledger.balance().trained, killed.contradictions()) == (8, [])
    assert killed.stream.window_ids() == set()


def test_the_same_command_again_says_finished_and_a_larger_one_goes_on(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write(documents_of(stack, range(2)))
    train(stack.settings, Event())
    version = stack.coordination.announced_version()
    train(stack.settings, Event())
    assert stack.coordination.announced_version() == version
    train(stack.with_trainer(steps=2).settings, Event())
    assert stack.coordination.announced_version() == 3  # 0 and 1, the republished 2, and 3 after step 2
    assert stack.ledger.balance().trained == 2


def test_the_end_of_the_source_makes_one_last_smaller_step(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=4)
    stack.write(documents_of(stack, range(2)))  # 6 pairs
    stack.end_source(max_epochs=0)
    train(stack.settings, Event())
    assert [row.figures["pairs"] for row in rows_of(stack)] == [4, 2]
    report = stack.coordination.trainer_report()
    assert report is not None
    assert report.state == "finished"
    assert stack.ledger.balance().trained == 2


def test_the_end_of_fewer_epochs_is_not_the_end(make_stack: MakeStack) -> None:
    stack = make_stack(steps=9, pairs_per_step=3, stream_timeout_s=2.0)
    stack.write(documents_of(stack, [0]))
    stack.end_source(max_epochs=2)
    with pytest.raises(TrainingError, match="no window arrived"):
        train(stack.settings, Event())


def test_stop_ends_the_wait_with_a_checkpoint(make_stack: MakeStack) -> None:
    stack, stop = make_stack(steps=9, pairs_per_step=3), Event()
    stack.write(documents_of(stack, [0]))
    timer = Timer(3.0, stop.set)
    timer.start()
    train(stack.settings, stop)
    timer.join()
    assert stack.ledger.balance().trained == 1
    report = stack.coordination.trainer_report()
    assert report is not None
    assert (report.step, report.state) == (1, "training")


def test_no_document_for_too_long_is_an_error_that_says_where_to_look(make_stack: MakeStack) -> None:
    stack = make_stack(stream_timeout_s=0.5)
    with pytest.raises(TrainingError, match="is a collector running"):
        train(stack.settings, Event())


def test_a_non_finite_loss_is_skipped_and_training_goes_on(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, checkpoint_every=1)
    stack.write(documents_of(stack, range(3)))
    trainer = stack.prepare()
    good = {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}
    norm = trainer.policy.model.get_parameter("model.norm.weight")
    with torch.no_grad():
        norm.fill_(float("nan"))
    trainer.take_step(trainer._next_pairs())
    assert (trainer.step, trainer.bad_steps) == (0, 1)
    trainer.policy.model.load_state_dict(good)
    trainer.run()
    assert stack.ledger.balance().dropped == {"non_finite_loss": 1}
    assert (stack.ledger.balance().trained, stack.ledger.balance().in_flight) == (2, 0)
    assert rows_of(stack)[0].figures["skipped_steps"] == 1
    assert stack.contradictions() == []


def test_non_finite_losses_in_a_row_stop_the_run_with_the_checkpoint_intact(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3, max_bad_steps=2)
    stack.write(documents_of(stack, range(4)))
    train(stack.settings, Event())
    before = weights_at(stack, 1)
    trainer = stack.with_trainer(steps=9, max_bad_steps=2).prepare()
    with torch.no_grad():
        trainer.policy.model.get_parameter("model.norm.weight").fill_(float("inf"))
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.run()
    assert_equal_weights(weights_at(stack, 1), before)
    assert (stack.ledger.balance().trained, stack.ledger.balance().in_flight) == (1, 3)


def test_older_checkpoints_and_half_written_ones_are_deleted(make_stack: MakeStack) -> None:
    stack = make_stack(steps=4, pairs_per_step=3, checkpoint_every=1, keep_checkpoints=2)
    stack.write(documents_of(stack, range(4)))
    root = stack.settings.run.folder / "checkpoints"
    (root / "step-00000009.tmp").mkdir(parents=True)
    train(stack.settings, Event())
    assert sorted(entry.name for entry in root.iterdir()) == ["finished.jsonl", "step-00000003", "step-00000004"]


def test_a_damaged_checkpoint_is_an_error_not_a_step_back(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write(documents_of(stack, [0]))
    train(stack.settings, Event())
    (stack.settings.run.folder / "checkpoints/step-00000001/state.json").write_text("{")
    with pytest.raises(TrainingError, match="restore the checkpoint"):
        train(stack.settings, Event())


def test_the_reference_is_saved_only_once_refreshed(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3, checkpoint_every=1, refresh_reference_every=2)
    stack.write(documents_of(stack, range(2)))
    train(stack.settings, Event())
    checkpoints = stack.settings.run.folder / "checkpoints"
    assert not (checkpoints / "step-00000001/reference").exists()
    assert (checkpoints / "step-00000002/reference/model.safetensors").is_file()


def test_a_missing_model_is_named(make_stack: MakeStack, tmp_path: Path) -> None:
    stack = make_stack()
    policy = stack.settings.policy.model_copy(update={"model": str(tmp_path / "nowhere")})
    run = stack.settings.run.model_copy(update={"name": "another"})
    with pytest.raises(SettingsError, match=r"policy.model: .*nowhere"):
        train(stack.settings.model_copy(update={"policy": policy, "run": run}), Event())


def test_another_identity_is_refused(make_stack: MakeStack) -> None:
    stack = make_stack(objective="dpo")
    with pytest.raises(SettingsError, match=r"trainer\.objective was 'dpo' and is now 'rf_nll'"):
        train(stack.with_trainer(objective="rf_nll").settings, Event())


def test_tensorboard_gets_every_figure(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3, log_tensorboard=True)
    stack.write(documents_of(stack, [0]))
    train(stack.settings, Event())
    files = list((stack.settings.run.folder / "tensorboard").iterdir())
    assert b"reward_margin" in files[0].read_bytes()


def test_the_documentation_names_every_figure() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    assert [name for name, meaning in FIGURES.items() if f"| `{name}` | {meaning} |" not in page] == []
