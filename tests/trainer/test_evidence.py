"""The line that each checkpoint leaves: what is in it, and what a crash does to it."""

import json
from collections.abc import Callable
from threading import Event
from typing import Any

import sqlalchemy as sa
import torch

from shared.database import WindowRow, transaction
from tests.trainer.conftest import Stack
from tests.trainer.windows import candidate, chunk, plain_window, window
from trainer.assembly import train

MakeStack = Callable[..., Stack]


def lines_of(stack: Stack) -> list[dict[str, Any]]:
    path = stack.settings.run.folder / "checkpoints/finished.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_run_tells_which_updates_each_document_is_in_and_keeps_it(make_stack: MakeStack) -> None:
    """Three windows of three pairs, steps of four: the second is in both steps, the third has one pair left."""
    stack = make_stack(steps=2, pairs_per_step=4, checkpoint_every=1, keep_checkpoints=1)
    stack.write(plain_window(number, run=stack.run) for number in range(3))
    train(stack.settings, Event())
    first, second = lines_of(stack)
    assert (first["number"], first["after"], first["step"]) == (1, 0, 1)
    assert (second["number"], second["after"], second["step"]) == (2, 1, 2)
    assert {name: one["pairs_by_step"] for name, one in first["finished"].items()} == {"0.0.0.0": {"1": 3}}
    assert {name: one["pairs_by_step"] for name, one in second["finished"].items()} == {"0.0.1.0": {"1": 1, "2": 2}}
    assert second["partial"] == {"0.0.2.0": {"used": 2, "step": 2, "pairs_by_step": {"2": 2}}}
    with transaction(stack.records.database) as session:
        rows = session.execute(sa.select(WindowRow.num_pairs).order_by(WindowRow.position)).scalars().all()
    assert rows == [3, 3, None]


def test_pairs_of_a_skipped_step_are_told_apart(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=4)
    stack.write(plain_window(number, run=stack.run) for number in range(3))
    trainer = stack.prepare()
    norm = trainer.policy.model.get_parameter("model.norm.weight")
    good = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    trainer.take_step(trainer._next_pairs())  # three pairs of the first window, one of the second
    with torch.no_grad():
        norm.copy_(good)
    trainer.run()
    (only,) = lines_of(stack)
    skipped = {name: (one["pairs_by_step"], one["num_skipped"]) for name, one in only["finished"].items()}
    assert skipped == {"0.0.0.0": ({}, 3), "0.0.1.0": ({"1": 2}, 1)}
    assert stack.contradictions() == []


def test_a_document_in_the_middle_that_comes_back_with_fewer_pairs_is_trained_not_dropped(
    make_stack: MakeStack,
) -> None:
    """A Redis that lost it: the collector scored it again, and now all its candidates tie."""
    stack = make_stack(steps=1, pairs_per_step=2)
    stack.write([plain_window(0, run=stack.run)])
    train(stack.settings, Event())
    (entry,) = stack.stream.read_pending()
    stack.stream.acknowledge({entry.entry_id: entry.window_id})
    tie = window(0, [chunk(4, [candidate("original", 1), candidate("rewrite", 2)], (0.5, 0.5))], run=stack.run)
    stack.stream.write(tie)
    stack.write([plain_window(1, run=stack.run)])
    train(stack.with_trainer(steps=2).settings, Event())
    assert (stack.ledger.balance().dropped, stack.ledger.balance().trained) == ({}, 1)
    assert stack.contradictions() == []
