"""The inbox and its reader by themselves, on a real Redis and SQLite: whole windows, read-ahead, limits, and what
becomes of every window."""

from collections.abc import Callable, Iterator
from contextlib import closing
from random import Random
from threading import Event

import pytest

from shared.checkpoint_state import FinishedWindow
from shared.database import WindowRow
from shared.errors import DatabaseError, StreamError, StreamSchemaError, TrainingError
from shared.ledger import WindowStart
from shared.records import TRAINER_PART, ScoredWindow
from shared.redis import lease_key, window_ids_key, windows_key
from shared.retries import Retries
from shared.stream import SCHEMA, WindowStream, encode
from tests.services.serving import wait_until
from tests.trainer.conftest import MakeStack, Stack
from tests.trainer.windows import plain_window, tie
from trainer.connections import Connections
from trainer.figures import Tally
from trainer.inbox import Inbox, TakenWindow

STEPS = {0: 0, 1: 1, 2: 2, 3: 3}
"""Weight version -> step."""


_OPENED: list[Connections] = []


@pytest.fixture(autouse=True)
def _leases_end() -> Iterator[None]:
    yield
    while _OPENED:
        _OPENED.pop().close()


def open_inbox(stack: Stack, steps: dict[int, int] = STEPS) -> Inbox:
    stack.client.delete(lease_key(stack.run, TRAINER_PART))  # that of one which crashed has ended
    connections = Connections.open(stack.settings, Retries(give_up_s=0.0))
    assert connections is not None
    _OPENED.append(connections)
    return Inbox(stack.settings, connections, steps=steps, tally=Tally())


@pytest.fixture
def inboxes() -> Iterator[Callable[[Stack], Inbox]]:
    opened: list[Inbox] = []

    def open_one(stack: Stack) -> Inbox:
        opened.append(open_inbox(stack))
        return opened[-1]

    yield open_one
    for inbox in opened:
        inbox.close()


OpenInbox = Callable[[Stack], Inbox]


def take(inbox: Inbox, step: int) -> list[TakenWindow]:
    """Until there is an answer."""
    for _ in range(100):
        if (windows := inbox.take(step, timeout_s=0.2)) is not None:
            return windows
    raise AssertionError("the inbox never had a step's windows")


def names(windows: list[TakenWindow]) -> list[str]:
    return [window.window_id for window in windows]


def sized(sizes: list[int], run: str) -> list[ScoredWindow]:
    return [plain_window(number, num_chunks=size, run=run) for number, size in enumerate(sizes)]


def test_a_step_takes_whole_windows_in_order_and_the_end_of_the_source_is_told(
    make_stack: MakeStack, inboxes: OpenInbox
) -> None:
    stack = make_stack(pairs_per_step=4)
    stack.write(sized([3, 2, 5, 1, 1], stack.run))
    inbox = inboxes(stack)
    first, second = take(inbox, 1), take(inbox, 2)
    assert [(one.window_id, len(one.pairs)) for one in first] == [("0.0.0.0", 3), ("0.0.1.0", 2)]
    assert [(one.window_id, len(one.pairs)) for one in second] == [("0.0.2.0", 5)]
    assert inbox.take(3, timeout_s=0.1) is None  # two pairs are there: not yet
    stack.end_source(max_epochs=0)
    assert names(take(inbox, 3)) == ["0.0.3.0", "0.0.4.0"]
    assert (take(inbox, 4), take(inbox, 4)) == ([], [])


def test_read_ahead_stops_at_what_the_next_step_needs(make_stack: MakeStack, inboxes: OpenInbox) -> None:
    stack = make_stack(pairs_per_step=4)
    stack.write_plain(range(9))
    inbox = inboxes(stack)
    assert len(take(inbox, 1)) == 2
    wait_until(lambda: stack.stream.backlog().pending == 4, what="two windows in hand for the next step")
    assert inbox.take(2) is not None
    wait_until(lambda: stack.stream.backlog().pending == 6, what="two more")


def test_what_a_crash_left_comes_first_and_in_order(make_stack: MakeStack, inboxes: OpenInbox) -> None:
    stack = make_stack(pairs_per_step=3)
    stack.write_plain(range(4))
    with closing(open_inbox(stack)) as crashed:
        assert names(take(crashed, 1)) == ["0.0.0.0"]
        wait_until(lambda: stack.stream.backlog().pending == 2, what="one read ahead")
    resumed = inboxes(stack)
    assert [names(take(resumed, step)) for step in (1, 2, 3, 4)] == [[f"0.0.{number}.0"] for number in range(4)]


def test_closing_stops_the_reader_and_leaves_the_rest_on_the_stream(make_stack: MakeStack) -> None:
    stack = make_stack(pairs_per_step=3)
    stack.write_plain([0])
    inbox = open_inbox(stack)
    take(inbox, 1)
    inbox.close()
    stack.write_plain([1])
    assert stack.stream.read(count=1, block_s=0.3)[0].window_id == "0.0.1.0"  # nobody else has read it


def test_lag_is_decided_by_the_step_that_takes_a_window(make_stack: MakeStack, inboxes: OpenInbox) -> None:
    """At lag 1, update 3 takes the weights after steps 2 and 1. Those after step 3 are of before a resume."""
    stack = make_stack(pairs_per_step=3, max_policy_lag=1)
    stack.write(plain_window(number, version=version, run=stack.run) for number, version in enumerate([0, 1, 2, 3, 4]))
    stack.end_source(max_epochs=0)
    inbox = inboxes(stack)
    assert [(one.window_id, one.lag) for step in (3, 3, 3) for one in take(inbox, step)] == [
        ("0.0.1.0", 1),
        ("0.0.2.0", 0),
        ("0.0.3.0", 0),
    ]
    assert take(inbox, 4) == []
    assert stack.counts()[1] == {"stale": 1, "newer_than_policy": 1}


def test_windows_that_only_arrive_to_be_dropped_stop_the_run(make_stack: MakeStack, inboxes: OpenInbox) -> None:
    """Five in a row; the one that is trained in between starts the count anew."""
    stack = make_stack(pairs_per_step=3, max_policy_lag=1, max_dropped_windows=5)
    dropped = [*(tie(number, stack.run) for number in range(4)), plain_window(5, run=stack.run, version=3)]
    stack.write(dropped)
    stack.write(plain_window(number, run=stack.run) for number in range(6, 10))
    stack.write([tie(10, stack.run), plain_window(11, run=stack.run)])
    inbox = inboxes(stack)
    assert names(take(inbox, 4)) == ["0.0.5.0"]
    with pytest.raises(TrainingError, match=r"5 windows in a row .*: 4 stale, 1 no_preference; raise trainer\.max_pol"):
        take(inbox, 4)
    assert stack.counts() == (0, {"no_preference": 5, "stale": 4}, 2)


def test_the_time_limit_holds_although_windows_arrive_where_none_can_be_trained(
    make_stack: MakeStack, inboxes: OpenInbox
) -> None:
    stack = make_stack(pairs_per_step=3, stream_timeout_s=0.5)
    inbox = inboxes(stack)

    def go_on() -> None:
        for number in range(1000):
            stack.write([tie(number, stack.run)])
            assert inbox.take(1, timeout_s=0.05) is None

    with pytest.raises(TrainingError, match=r"no window that can be trained arrived for 0\.5 s .* no_preference; look"):
        go_on()


def write_foreign(stack: Stack, number: int) -> None:
    """An entry of another version of Headwater."""
    window = plain_window(number, run=stack.run)
    stack.ledger.begin([WindowStart(window.key, window.source_id, 8)])
    fields = {b"id": window.window_id, b"schema": SCHEMA + 1, b"body": encode(window)}
    stack.client.xadd(windows_key(stack.run), fields)


def test_an_entry_of_another_schema_ends_the_reader_and_is_never_dropped(
    make_stack: MakeStack, inboxes: OpenInbox
) -> None:
    stack = make_stack(pairs_per_step=3)
    stack.write_plain([0])
    write_foreign(stack, 1)
    inbox = inboxes(stack)
    inbox.take(1)
    wait_until(lambda: stack.stream.backlog().pending == 2, what="the foreign entry in the reader's hands")
    for _ in range(2):  # it stays an error
        with pytest.raises(StreamSchemaError, match=f"entries of schema {SCHEMA + 1}"):
            take(inbox, 2)
    assert (stack.counts(), stack.stream.window_ids()) == ((0, {}, 2), {"0.0.0.0"})
    assert stack.stream.backlog().pending == 2


@pytest.mark.parametrize(
    ("owner", "error"), [("stream.WindowStream.read", StreamError), ("ledger.Ledger.finished_among", DatabaseError)]
)
def test_an_error_of_the_reader_is_the_loops(
    make_stack: MakeStack, inboxes: OpenInbox, monkeypatch: pytest.MonkeyPatch, owner: str, error: type[Exception]
) -> None:
    def be_away(*_: object, **__: object) -> None:
        raise error("away")

    stack = make_stack(pairs_per_step=3)
    stack.write_plain([0])
    inbox = inboxes(stack)
    monkeypatch.setattr(f"shared.{owner}", be_away)
    with pytest.raises(error, match="away"):
        take(inbox, 1)


def test_a_stop_of_the_whole_trainer_ends_a_reader_in_an_outage(
    make_stack: MakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, stop = Event(), Event()

    def be_away(*_: object, **__: object) -> None:
        asked.set()
        raise StreamError("away")

    stack = make_stack()
    monkeypatch.setattr(WindowStream, "read", be_away)
    connections = Connections.open(stack.settings, Retries(stop=stop, stopping_s=0.0))
    assert connections is not None
    _OPENED.append(connections)
    inbox = Inbox(stack.settings, connections, steps=STEPS, tally=Tally())
    assert inbox.take(1, timeout_s=0.1) is None
    assert asked.wait(10)
    stop.set()
    with pytest.raises(StreamError, match="away"):
        take(inbox, 1)
    inbox.close()


def test_applied_windows_are_for_one_checkpoint_and_pending_until_its_commit(
    make_stack: MakeStack, inboxes: OpenInbox
) -> None:
    stack = make_stack(pairs_per_step=3)
    stack.write_plain(range(3))
    inbox = inboxes(stack)
    for step in (1, 2):
        inbox.mark_applied(take(inbox, step), step)
    finished = inbox.finished()
    inbox.mark_applied(take(inbox, 3), 3)
    assert {name: (one.step, one.num_pairs) for name, one in finished.items()} == {"0.0.0.0": (1, 3), "0.0.1.0": (2, 3)}
    assert (stack.counts(), stack.stream.backlog().pending) == ((0, {}, 3), 3)
    inbox.commit(finished)
    assert (stack.counts(), stack.stream.window_ids()) == ((2, {}, 1), {"0.0.2.0"})
    assert inbox.finished().keys() == {"0.0.2.0"}
    assert inbox.finished() == {}


class Story:
    """A trainer without a model: takes, applies or skips, checkpoints, crashes. Remembers what it did."""

    def __init__(self, stack: Stack, random: Random) -> None:
        self.stack, self.random = stack, random
        self.inbox = open_inbox(stack)
        self.step, self.checkpoint = 3, 3
        self.applied: dict[str, int] = {}
        """Of the checkpoints."""
        self.since: dict[str, FinishedWindow] = {}

    def go_on(self) -> bool:
        """False at the end of the source."""
        windows = take(self.inbox, self.step + 1)
        if not windows:
            self.save()
            return False
        if self.random.random() < 0.2:
            self.inbox.drop_skipped(windows)
        else:
            self.step += 1
            self.inbox.mark_applied(windows, self.step)
        if self.random.random() < 0.3:
            self.save()
        if self.random.random() < 0.2:
            self.crash()
        return True

    def save(self) -> None:
        finished = self.inbox.finished()
        assert not finished.keys() & self.applied.keys(), "in two checkpoints"
        self.applied |= {name: one.step for name, one in finished.items()}
        self.checkpoint = self.step
        self.inbox.commit(finished)

    def crash(self) -> None:
        self.inbox.close()
        self.inbox, self.step = open_inbox(self.stack), self.checkpoint


def arrivals(random: Random, run: str) -> list[ScoredWindow]:
    """Forty windows: some tie, some are stale, some come from a policy that was never published."""
    makers: list[Callable[[int], ScoredWindow]] = [
        lambda number: tie(number, run),
        lambda number: plain_window(number, num_chunks=1 + number % 3, version=0, run=run),
        lambda number: plain_window(number, num_chunks=1 + number % 3, version=3, run=run),
        lambda number: plain_window(number, version=9, run=run),
    ]
    return [random.choices(makers, weights=[1, 3, 8, 1])[0](number) for number in range(40)]


@pytest.mark.parametrize("seed", range(4))
def test_every_window_ends_in_exactly_one_of_applied_dropped_and_pending(make_stack: MakeStack, seed: int) -> None:
    random = Random(seed)
    stack = make_stack(pairs_per_step=4, max_policy_lag=6)
    for window in arrivals(random, stack.run):
        stack.write([window])
        if random.random() < 0.2:
            stack.client.delete(window_ids_key(stack.run))  # or it would not be written again
            stack.stream.write(window)
    story = Story(stack, random)
    for _ in range(random.randrange(7)):
        story.go_on()
    assert_each_is_somewhere(stack, story)
    stack.end_source(max_epochs=0)
    while story.go_on():
        pass
    story.inbox.close()
    assert_each_is_somewhere(stack, story)
    assert stack.stream.entries() == {}


def assert_each_is_somewhere(stack: Stack, story: Story) -> None:
    rows = {f"{row.part}.{row.epoch}.{row.position}.{row.window}": row for row in stack.rows(WindowRow)}
    trained = {name: row.trained_step for name, row in rows.items() if row.state == "trained"}
    dropped = {name for name, row in rows.items() if row.state == "dropped"}
    on_stream = set(stack.stream.entries().values())
    assert trained == story.applied
    assert not trained.keys() & dropped
    assert rows.keys() - trained.keys() - dropped <= on_stream, "one is lost"
