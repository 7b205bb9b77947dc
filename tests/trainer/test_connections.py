"""Every call waits out an outage, and no delivery is lost with an answer."""

from typing import Any

import pytest

from shared.errors import StreamError
from shared.retries import Retries
from shared.stream import StreamEntry, WindowStream
from tests.trainer.conftest import MakeStack
from trainer.connections import Deliveries, retrying


class Store:
    name = "store"

    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def add(self, one: int, *, other: int) -> int:
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise StreamError("away")
        return one + other


def test_a_method_is_called_until_it_answers_or_patience_ends() -> None:
    store = retrying(Store(2), Retries(max_wait_s=0.001))
    assert (store.name, store.add(1, other=2)) == ("store", 3)
    with pytest.raises(StreamError, match="away"):
        retrying(Store(10**9), Retries(give_up_s=0.0)).add(1, other=2)


def test_an_entry_whose_answer_was_lost_is_delivered_again(make_stack: MakeStack) -> None:
    class Losing(WindowStream):
        def read(self, **options: Any) -> list[Any]:
            super().read(**options)
            raise StreamError("lost")

    stack = make_stack()
    stack.write_plain([0])
    entry = retrying(Deliveries(Losing(stack.client, stack.run)), Retries(max_wait_s=0.001)).next()
    assert isinstance(entry, StreamEntry)
    assert entry.window_id == "0.0.0.0"
