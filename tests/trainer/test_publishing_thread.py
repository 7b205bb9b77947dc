"""The publisher's thread: the newest weights win, outages are waited out, errors reach the training thread."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from shared.errors import WeightStoreAwayError, WeightStoreError
from shared.retries import Retries
from shared.weights.store import Manifest, VersionWriter, WeightStore
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack, tiny_llama
from tests.trainer.test_publisher import room_for, store_of, version_rows
from trainer.publisher import WeightPublisher

LIMIT_S = 30.0


class GatedStore(WeightStore):
    """Begins a version only once `gate` is open."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.gate = Event()

    def begin(self, version: int, *, step: int, epoch: str = "", base: int | None = None) -> VersionWriter:
        assert self.gate.wait(LIMIT_S)
        return super().begin(version, step=step, epoch=epoch, base=base)


class ForgetfulStore(WeightStore):
    """Writes the first manifest, and its answer is lost."""

    num_lost = 0

    def _finish(self, manifest: Manifest) -> None:
        super()._finish(manifest)
        self.num_lost += 1
        if self.num_lost == 1:
            raise TimeoutError("no answer")


@dataclass
class Failures:
    """Notes the attempts that failed; `first` is set with the first one."""

    errors: list[BaseException] = field(default_factory=list)
    first: Event = field(default_factory=Event)

    def __call__(self, attempt: int, error: BaseException) -> None:
        self.errors.append(error)
        self.first.set()


def publisher_on(stack: Stack, store: Callable[[str], WeightStore], **weights: Any) -> WeightPublisher:
    publisher = stack.with_settings("weights", **weights).prepare_lead().publisher
    return replace(publisher, store=store(stack.settings.weight_store_url))


def retrying(stack: Stack, retries: Retries) -> WeightPublisher:
    return replace(stack.prepare_lead().publisher, retries=retries)


def offer(publisher: WeightPublisher, model: LlamaForCausalLM, step: int) -> bool:
    """What the loop does at a boundary: whether the weights after `step` were taken."""
    if due := publisher.is_due(step):
        publisher.begin(model, step)
    return due


def test_the_newest_weights_are_published_once_the_thread_is_idle(make_stack: MakeStack) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = publisher_on(stack, GatedStore)
    assert isinstance(publisher.store, GatedStore)
    assert offer(publisher, model, 1)
    assert [offer(publisher, model, step) for step in (2, 3)] == [False, False]
    assert (publisher.offered_step, publisher.version) == (1, -1)
    publisher.store.gate.set()
    publisher.wait()
    assert offer(publisher, model, 4)
    publisher.wait()
    assert not offer(publisher, model, 4)
    assert publisher.steps == {0: 1, 1: 4}
    assert [row[:2] for row in version_rows(stack)] == [(0, 1), (1, 4)]


def test_a_version_that_was_due_while_the_thread_was_busy_is_made_up_for(make_stack: MakeStack) -> None:
    stack, model = make_stack(), tiny_llama()
    publisher = publisher_on(stack, GatedStore, push_every=2)
    assert isinstance(publisher.store, GatedStore)
    publisher.store.gate.set()
    publisher.publish(model, 0)
    publisher.store.gate.clear()
    assert [offer(publisher, model, step) for step in (1, 2, 3, 4)] == [False, True, False, False]
    publisher.store.gate.set()
    publisher.wait()
    assert offer(publisher, model, 5)
    publisher.wait()
    assert [offer(publisher, model, step) for step in (5, 6, 7)] == [False, True, False]
    publisher.wait()
    assert publisher.steps == {0: 0, 1: 2, 2: 5, 3: 6}


def test_the_last_step_is_published_whatever_push_every_says(make_stack: MakeStack) -> None:
    stack = make_stack(steps=3, pairs_per_step=3).with_settings("weights", push_every=5)
    stack.write_plain(range(3))
    stack.train()
    assert [row[:2] for row in version_rows(stack)] == [(0, 0), (1, 3)]
    assert (stack.coordination.announced_version(), stack.report()) == (1, (3, 1, "finished"))


def test_one_that_was_published_is_not_published_again_at_the_end(make_stack: MakeStack) -> None:
    stack = make_stack(steps=2, pairs_per_step=3).with_settings("weights", push_every=2)
    stack.write_plain(range(2))
    stack.train()
    assert [row[:2] for row in version_rows(stack)] == [(0, 0), (1, 2)]


def test_steps_of_earlier_versions_are_known_after_a_restart(make_stack: MakeStack) -> None:
    stack = make_stack()
    first = stack.prepare_lead().publisher
    for step in (0, 4):
        first.publish(tiny_llama(), step)
    second = stack.prepare_lead().publisher
    assert second.steps == {0: 0, 1: 4}
    second.publish(tiny_llama(), 4)
    assert second.steps == {0: 0, 1: 4, 2: 4}


def test_an_outage_of_the_store_is_waited_out(make_stack: MakeStack) -> None:
    stack, failures = make_stack(), Failures()
    publisher = retrying(stack, Retries(max_wait_s=0.05, on_failure=failures))
    with room_for(10_000):
        publisher.begin(tiny_llama(), 1)
        assert failures.first.wait(LIMIT_S)
        assert not publisher.is_due(2)
    publisher.wait()
    assert {type(error) for error in failures.errors} == {WeightStoreAwayError}
    assert (publisher.version, store_of(stack).versions(), publisher.steps) == (0, [0], {0: 1})


def test_an_outage_that_lasts_is_raised_in_the_training_thread(make_stack: MakeStack) -> None:
    stack = make_stack()
    publisher = retrying(stack, Retries(max_attempts=2, max_wait_s=0.01))
    with room_for(10_000):
        publisher.begin(tiny_llama(), 1)
        with pytest.raises(WeightStoreAwayError, match="version 0 can't be written"):
            wait_until(lambda: publisher.is_due(2), what="the thread", timeout_s=LIMIT_S)
    assert (publisher.version, publisher.steps) == (-1, {})


def test_stop_shortens_the_wait_for_the_store(make_stack: MakeStack) -> None:
    stack, failures, stop = make_stack(), Failures(), Event()
    publisher = retrying(stack, Retries(stop=stop, stopping_s=0.0, on_failure=failures))
    with room_for(10_000):
        publisher.begin(tiny_llama(), 1)
        assert failures.first.wait(LIMIT_S)
        stop.set()
        with pytest.raises(WeightStoreAwayError):
            publisher.wait()


def test_what_waiting_cannot_cure_is_raised_at_once(make_stack: MakeStack) -> None:
    stack, failures = make_stack(), Failures()
    publisher = retrying(stack, Retries(on_failure=failures))
    root = stack.settings.run.folder / "weights"
    root.parent.mkdir(parents=True, exist_ok=True)
    root.write_text("not a folder")
    with pytest.raises(WeightStoreError, match=r"mend weights\.store"):
        publisher.publish(tiny_llama(), 0)
    assert failures.errors == []


def test_a_version_whose_answer_was_lost_is_not_written_twice(make_stack: MakeStack) -> None:
    stack = make_stack()
    publisher = replace(publisher_on(stack, ForgetfulStore), retries=Retries(max_wait_s=0.01))
    assert publisher.publish(tiny_llama(), 0) == 0
    assert (store_of(stack).versions(), stack.coordination.announced_version()) == ([0], 0)
    assert isinstance(publisher.store, ForgetfulStore)
    assert publisher.store.num_lost == 1
