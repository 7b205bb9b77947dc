"""The ledger's rules, each on SQLite and on PostgreSQL."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from shared.database import EventRow, WindowRow, transaction
from shared.errors import FencedError
from shared.ledger import Balance, Ledger, Position, WindowStart
from shared.records import Lease, WindowKey


def key(position: int, *, window: int = 0, part: int = 0, epoch: int = 0) -> WindowKey:
    return WindowKey(part=part, epoch=epoch, position=position, window=window)


@pytest.fixture
def ledger(database: sa.Engine) -> Ledger:
    return Ledger(database, "run")


def begin(ledger: Ledger, *keys: WindowKey) -> None:
    ledger.begin([WindowStart(found, f"d{found.position}", 32) for found in keys])


def score(ledger: Ledger, *keys: WindowKey) -> None:
    for found in keys:
        ledger.mark_scored(found, num_chunks=3, num_dropped_chunks=1, weight_version=2)


def take(ledger: Ledger, part: int) -> int:
    return ledger.take_part(part, after=ledger.lease_epoch(part))


def rows(database: sa.Engine) -> Sequence[WindowRow]:
    with transaction(database) as session:
        found = session.scalars(sa.select(WindowRow).order_by(WindowRow.position, WindowRow.window)).all()
        session.expunge_all()
    return found


def test_a_window_goes_from_reading_over_scored_to_trained(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0))
    assert rows(database)[0].state == "reading"
    score(ledger, key(0))
    ledger.mark_trained({"0.0.0.0": 7}, num_pairs={"0.0.0.0": 2})
    (row,) = rows(database)
    assert (row.state, row.num_chunks, row.num_dropped_chunks, row.weight_version) == ("trained", 3, 1, 2)
    assert (row.trained_step, row.num_pairs) == (7, 2)
    assert row.finished_at is not None


def test_balance_counts_every_state(ledger: Ledger) -> None:
    begin(ledger, *(key(position) for position in range(6)))
    score(ledger, key(1), key(2), key(3))
    ledger.mark_trained({"0.0.2.0": 1})
    ledger.drop(key(3), reason="stale")
    ledger.drop(key(4), reason="stale")
    ledger.drop(key(9), reason="not_json", detail="f:3: not JSON", source_id="f:3")
    balance = ledger.balance()
    assert balance == Balance(read=7, trained=1, dropped={"stale": 2, "not_json": 1}, reading=2, scored=1)
    assert balance.in_flight == 3


def test_begin_repeated_keeps_the_rows_as_they_are(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0), key(0, window=1))
    score(ledger, key(0))
    begin(ledger, key(0), key(0, window=1), key(1))
    assert [row.state for row in rows(database)] == ["scored", "reading", "reading"]


def test_finished_windows_stay_finished(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0), key(1))
    ledger.mark_trained({"0.0.0.0": 3})
    ledger.drop(key(1), reason="stale")
    score(ledger, key(0), key(1))
    ledger.mark_trained({"0.0.0.0": 9, "0.0.1.0": 9})
    assert [(row.state, row.trained_step) for row in rows(database)] == [("trained", 3), ("dropped", None)]


def test_a_trained_window_that_is_dropped_stays_trained_and_an_event_tells(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0))
    ledger.mark_trained({"0.0.0.0": 3})
    lease = Lease(0, "me", take(ledger, 0))
    assert not ledger.drop(key(0), reason="stale")
    assert not ledger.drop(key(0), reason="judge_refused", lease=lease)
    assert [(row.state, row.reason, row.trained_step) for row in rows(database)] == [("trained", "", 3)]
    with transaction(database) as session:
        events = session.scalars(sa.select(EventRow).order_by(EventRow.id)).all()
        assert [(event.role, event.kind, event.data) for event in events] == [
            ("trainer", "kept_trained", {"window": "0.0.0.0", "reason": "stale"}),
            ("collector", "kept_trained", {"window": "0.0.0.0", "reason": "judge_refused"}),
        ]


def test_a_dropped_window_keeps_its_first_reason(ledger: Ledger) -> None:
    begin(ledger, key(0))
    assert ledger.drop(key(0), reason="stale")
    assert ledger.drop(key(0), reason="broken_entry")
    assert ledger.balance().dropped == {"stale": 1}


def test_a_lease_that_was_followed_writes_nothing(database: sa.Engine, ledger: Ledger) -> None:
    first = Lease(0, "a", take(ledger, 0))
    ledger.begin([WindowStart(key(0), "d0", 32)], first)
    ledger.begin([WindowStart(key(1), "d1", 32)], first)
    second = Lease(0, "b", take(ledger, 0))
    refused: list[Callable[[], object]] = [
        lambda: ledger.begin([WindowStart(key(2), "d2", 32)], first),
        lambda: ledger.mark_scored(key(0), num_chunks=3, num_dropped_chunks=0, weight_version=1, lease=first),
        lambda: ledger.drop(key(1), reason="judge_refused", lease=first),
        lambda: ledger.drop(key(3), reason="not_json", lease=first),
        lambda: ledger.mark_found(0, on_stream={"0.0.0.0"}, lease=first),
    ]
    for write in refused:
        with pytest.raises(FencedError, match="part 0 was taken by another collector after lease number 1"):
            write()
    assert [(row.position, row.state, row.lease_epoch) for row in rows(database)] == [
        (0, "reading", 1),
        (1, "reading", 1),
    ]
    assert ledger.next_position(0) == Position(0, 2)
    ledger.mark_scored(key(0), num_chunks=3, num_dropped_chunks=0, weight_version=1, lease=second)
    ledger.drop(key(1), reason="judge_refused", lease=second)
    assert [(row.state, row.lease_epoch) for row in rows(database)] == [("scored", 2), ("dropped", 2)]


def test_numbers_of_parts_and_runs_are_their_own(database: sa.Engine, ledger: Ledger) -> None:
    assert [take(ledger, part) for part in (0, 0, 1, 0)] == [1, 2, 1, 3]
    assert take(Ledger(database, "other"), 0) == 1


def test_a_part_that_was_taken_since_it_was_looked_at_is_not_taken(ledger: Ledger) -> None:
    before = ledger.lease_epoch(0)
    assert take(ledger, 0) == 1
    with pytest.raises(FencedError, match="part 0 was taken by another collector after lease number 0"):
        ledger.take_part(0, after=before)
    assert ledger.lease_epoch(0) == 1


def test_a_part_is_not_taken_between_the_check_and_the_write(database: sa.Engine, ledger: Ledger) -> None:
    """The write is under way when another takes the part: it is complete before the number rises."""
    lease = Lease(0, "a", take(ledger, 0))
    with ThreadPoolExecutor(1) as another:
        with transaction(database) as session:
            ledger.refuse_if_fenced(session, lease)
            taking = another.submit(ledger.take_part, 0, after=1)
            with pytest.raises(TimeoutError):
                taking.result(timeout=0.5)
            session.add(EventRow(run_id="run", at=1.0, role="r", kind="k", message="m", data={}))
        assert taking.result(timeout=30) == 2
    with pytest.raises(FencedError), transaction(database) as session:
        ledger.refuse_if_fenced(session, lease)


def test_finished_among_names_trained_and_dropped(ledger: Ledger) -> None:
    begin(ledger, key(0), key(1), key(2))
    ledger.mark_trained({"0.0.0.0": 1})
    ledger.drop(key(1), reason="stale")
    assert ledger.finished_among(["0.0.0.0", "0.0.1.0", "0.0.2.0", "0.0.8.0"]) == {"0.0.0.0", "0.0.1.0"}


def test_next_position_follows_the_newest_of_the_part(ledger: Ledger) -> None:
    assert ledger.next_position(0) == Position(0, 0)
    begin(ledger, key(4), key(4, window=1), key(9, part=1))
    assert ledger.next_position(0) == Position(0, 5)
    begin(ledger, key(0, epoch=1))
    ledger.drop(key(1, epoch=1), reason="empty", source_id="f:1")
    assert ledger.next_position(0) == Position(1, 2)
    assert ledger.next_position(1) == Position(0, 10)


def test_the_cursor_stays_where_rows_are_lost(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0), key(1))
    begin(ledger, key(2), key(2, window=1))
    with transaction(database) as session:
        session.execute(sa.delete(WindowRow).where(WindowRow.position == 2))
    assert ledger.next_position(0) == Position(0, 3)
    assert [row.num_windows for row in rows(database)] == [1, 1]


def test_each_window_knows_how_many_its_document_has(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0), *(key(1, window=window) for window in range(3)))
    ledger.drop(key(2), reason="not_json", source_id="f:3")
    assert [row.num_windows for row in rows(database)] == [1, 3, 3, 3, 1]


def test_unfinished_are_those_neither_finished_nor_on_the_stream(ledger: Ledger) -> None:
    begin(ledger, key(0), key(1), key(2), key(2, window=1), key(3), key(4), key(5, part=1))
    score(ledger, key(1), key(3))
    ledger.mark_trained({"0.0.4.0": 1})
    found = ledger.unfinished(0, on_stream={"0.0.1.0", "0.0.2.0"})
    assert found == {Position(0, 0): {0}, Position(0, 2): {1}, Position(0, 3): {0}}


def test_windows_found_on_the_stream_become_scored(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0), key(1), key(2), key(0, part=1))
    ledger.drop(key(2), reason="stale")
    assert ledger.mark_found(0, on_stream={"0.0.0.0", "0.0.2.0", "1.0.0.0"}) == 1
    assert [row.state for row in rows(database) if row.part == 0] == ["scored", "reading", "dropped"]


def test_runs_do_not_see_each_other(database: sa.Engine, ledger: Ledger) -> None:
    begin(ledger, key(0))
    other = Ledger(database, "other")
    assert other.next_position(0) == Position(0, 0)
    assert other.balance().read == 0


def test_details_are_storable_short_and_without_secrets(database: sa.Engine, ledger: Ledger) -> None:
    ledger.drop(key(0), reason="not_json", detail="\x00" + "x" * 5000, source_id="a\x00b")
    ledger.drop(key(1), reason="not_json", detail="caf\udce9", source_id="caf\udce9")
    ledger.drop(key(2), reason="judge_refused", detail="judge at http://me:hUsh@judge/v1: no", source_id="a:1")
    assert [(row.source_id, row.detail) for row in rows(database)] == [
        ("a\ufffdb", "\ufffd" + "x" * 1999),
        ("caf\\udce9", "caf\\udce9"),
        ("a:1", "judge at http://judge/v1: no"),
    ]
