"""Which windows are trained, dropped or acknowledged, in whole runs."""

import pytest

from shared.errors import StreamSchemaError
from shared.ledger import WindowStart
from shared.redis import window_ids_key, windows_key
from shared.stream import SCHEMA, encode
from tests.trainer.conftest import MakeStack
from tests.trainer.windows import plain_window, tie


def test_a_stale_window_is_dropped_counted_and_acknowledged(make_stack: MakeStack) -> None:
    """Lag is counted in steps: version 0 is one step old in update 2, version 1 is not."""
    stack = make_stack(steps=1, pairs_per_step=3, max_policy_lag=0)
    stack.write_plain(range(2))
    stack.train()
    stack.write([plain_window(2, version=1, run=stack.run)])
    stack.with_settings("trainer", steps=2).train()
    assert (stack.counts(), stack.stream.window_ids()) == ((2, {"stale": 1}, 0), set())
    assert stack.figures()[1]["stale_windows"] == 1


def test_a_window_ahead_of_the_policy_is_dropped_counted_and_acknowledged(make_stack: MakeStack) -> None:
    """One rollout of a version that this trainer never published is enough: it is another policy's."""
    stack = make_stack(steps=1, pairs_per_step=3)
    own, ahead = plain_window(0, run=stack.run), plain_window(1, version=1, run=stack.run)
    mixed = ahead.model_copy(
        update={"key": own.key.model_copy(update={"position": 2}), "chunks": own.chunks[:1] + ahead.chunks[1:]}
    )
    stack.write([ahead, mixed, own])
    stack.train()
    assert (stack.counts(), stack.stream.window_ids()) == ((1, {"newer_than_policy": 2}, 0), set())
    assert stack.figures()[0]["policy_lag_max"] == 0


@pytest.mark.parametrize("trained_before", [False, True])
def test_a_window_that_comes_twice_is_trained_once(make_stack: MakeStack, trained_before: bool) -> None:
    stack = make_stack(steps=1 if trained_before else 2, pairs_per_step=3)
    stack.write_plain([0])
    if trained_before:
        stack.train()
    stack.client.delete(window_ids_key(stack.run))  # or it would not be written again
    stack.stream.write(plain_window(0, run=stack.run))
    stack.write_plain([1])
    stack.with_settings("trainer", steps=2).train()
    assert stack.figures()[1]["duplicate_windows"] == 1
    assert (stack.counts(), stack.stream.window_ids()) == ((2, {}, 0), set())


def test_a_window_without_preference_is_dropped(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write([tie(0, stack.run), plain_window(1, run=stack.run)])
    stack.train()
    (figures,) = stack.figures()
    assert (figures["no_preference_windows"], figures["no_preference_chunks"]) == (1, 1)
    assert stack.counts() == (1, {"no_preference": 1}, 0)


def test_a_broken_entry_is_dropped_with_its_reason(make_stack: MakeStack) -> None:
    stack = make_stack(steps=1, pairs_per_step=3)
    stack.write_plain([0])
    ((entry, fields),) = stack.client.xrange(windows_key(stack.run))
    stack.client.xdel(windows_key(stack.run), entry)
    stack.client.xadd(windows_key(stack.run), fields | {b"body": b"\x00garbage"})
    stack.write_plain([1])
    stack.train()
    assert (stack.counts(), stack.contradictions()) == ((1, {"broken_entry": 1}, 0), [])


def test_an_entry_of_another_schema_ends_the_trainer_and_stays_on_the_stream(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3)
    foreign = plain_window(1, run=stack.run)
    stack.write_plain([0])
    stack.ledger.begin([WindowStart(foreign.key, foreign.source_id, 8)])
    fields = {b"id": foreign.window_id, b"schema": SCHEMA + 1, b"body": encode(foreign)}
    stack.client.xadd(windows_key(stack.run), fields)
    with pytest.raises(StreamSchemaError, match=f"entries of schema {SCHEMA + 1} and this version reads"):
        stack.train()
    assert (stack.counts()[1], stack.stream.backlog().pending) == ({}, 2)
