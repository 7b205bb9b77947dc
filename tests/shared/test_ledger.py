"""The ledger's rules, each on SQLite and on PostgreSQL."""

from collections.abc import Sequence

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from shared.database import DocumentRow, EventRow, RunRow, transaction
from shared.ledger import Balance, Ledger, Position, WindowStart
from shared.records import DocumentKey


def key(position: int, *, window: int = 0, part: int = 0, epoch: int = 0) -> DocumentKey:
    return DocumentKey(part=part, epoch=epoch, position=position, window=window)


def opened(database: Engine) -> Ledger:
    ledger = Ledger(database, "run")
    ledger.open_run({"seed": 1})
    return ledger


def begin(ledger: Ledger, *keys: DocumentKey) -> None:
    ledger.begin([WindowStart(found, f"d{found.position}", 32) for found in keys])


def score(ledger: Ledger, *keys: DocumentKey) -> None:
    for found in keys:
        ledger.mark_scored(found, num_chunks=3, num_dropped_chunks=1, policy_version=2)


def rows(database: Engine) -> Sequence[DocumentRow]:
    with transaction(database) as session:
        found = session.scalars(sa.select(DocumentRow).order_by(DocumentRow.position, DocumentRow.window)).all()
        session.expunge_all()
    return found


def test_a_window_goes_from_reading_over_scored_to_trained(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0))
    assert rows(database)[0].state == "reading"
    score(ledger, key(0))
    ledger.mark_trained({"0.0.0.0": 7})
    (row,) = rows(database)
    assert (row.state, row.num_chunks, row.num_dropped_chunks, row.policy_version, row.trained_step) == (
        "trained", 3, 1, 2, 7,
    )  # fmt: skip
    assert row.finished_at is not None


def test_balance_counts_every_state_and_holds(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, *(key(position) for position in range(6)))
    score(ledger, key(1), key(2), key(3))
    ledger.mark_trained({"0.0.2.0": 1})
    ledger.drop(key(3), reason="stale")
    ledger.drop(key(4), reason="stale")
    ledger.drop(key(9), reason="not_json", detail="f:3: not JSON", source_id="f:3")
    balance = ledger.balance()
    assert balance == Balance(read=7, trained=1, dropped={"stale": 2, "not_json": 1}, reading=2, scored=1)
    assert balance.in_flight == 3
    assert balance.holds


def test_begin_repeated_keeps_the_rows_as_they_are(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(0, window=1))
    score(ledger, key(0))
    begin(ledger, key(0), key(0, window=1), key(1))
    assert [row.state for row in rows(database)] == ["scored", "reading", "reading"]


def test_finished_windows_stay_finished(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(1))
    ledger.mark_trained({"0.0.0.0": 3})
    ledger.drop(key(1), reason="stale")
    score(ledger, key(0), key(1))
    ledger.mark_trained({"0.0.0.0": 9, "0.0.1.0": 9})
    assert [(row.state, row.trained_step) for row in rows(database)] == [("trained", 3), ("dropped", None)]


def test_trained_windows_cannot_be_dropped(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0))
    ledger.mark_trained({"0.0.0.0": 3})
    with pytest.raises(AssertionError, match=r"0\.0\.0\.0 is trained already"):
        ledger.drop(key(0), reason="stale")


def test_trained_among_names_trained_and_dropped(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(1), key(2))
    ledger.mark_trained({"0.0.0.0": 1})
    ledger.drop(key(1), reason="stale")
    assert ledger.trained_among(["0.0.0.0", "0.0.1.0", "0.0.2.0", "0.0.8.0"]) == {"0.0.0.0", "0.0.1.0"}


def test_next_position_follows_the_newest_of_the_part(database: Engine) -> None:
    ledger = opened(database)
    assert ledger.next_position(0) == Position(0, 0)
    begin(ledger, key(4), key(4, window=1), key(9, part=1))
    assert ledger.next_position(0) == Position(0, 5)
    begin(ledger, key(0, epoch=1))
    ledger.drop(key(1, epoch=1), reason="empty", source_id="f:1")
    assert ledger.next_position(0) == Position(1, 2)
    assert ledger.next_position(1) == Position(0, 10)


def test_the_cursor_stays_where_rows_are_lost(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(1))
    begin(ledger, key(2), key(2, window=1))
    with transaction(database) as session:
        session.execute(sa.delete(DocumentRow).where(DocumentRow.position == 2))
    assert ledger.next_position(0) == Position(0, 3)
    assert [row.num_windows for row in rows(database)] == [1, 1]


def test_each_window_knows_how_many_its_document_has(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), *(key(1, window=window) for window in range(3)))
    ledger.drop(key(2), reason="not_json", source_id="f:3")
    assert [row.num_windows for row in rows(database)] == [1, 3, 3, 3, 1]


def test_unfinished_are_those_neither_finished_nor_on_the_stream(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(1), key(2), key(2, window=1), key(3), key(4), key(5, part=1))
    score(ledger, key(1), key(3))
    ledger.mark_trained({"0.0.4.0": 1})
    found = ledger.unfinished(0, on_stream={"0.0.1.0", "0.0.2.0"})
    assert found == {Position(0, 0): {0}, Position(0, 2): {1}, Position(0, 3): {0}}


def test_windows_found_on_the_stream_become_scored(database: Engine) -> None:
    ledger = opened(database)
    begin(ledger, key(0), key(1), key(2), key(0, part=1))
    ledger.drop(key(2), reason="stale")
    assert ledger.mark_found(0, on_stream={"0.0.0.0", "0.0.2.0", "1.0.0.0"}) == 1
    assert [row.state for row in rows(database) if row.part == 0] == ["scored", "reading", "dropped"]


def test_runs_do_not_see_each_other(database: Engine) -> None:
    begin(opened(database), key(0))
    other = Ledger(database, "other")
    assert other.next_position(0) == Position(0, 0)
    assert other.balance().read == 0


def test_texts_with_nul_and_very_long_details_are_kept(database: Engine) -> None:
    ledger = opened(database)
    ledger.drop(key(0), reason="not_json", detail="\x00" + "x" * 5000, source_id="a\x00b")
    (row,) = rows(database)
    assert row.source_id == "a\ufffdb"
    assert row.detail == "\ufffd" + "x" * 1999


def test_no_secret_of_a_url_becomes_a_row(database: Engine) -> None:
    ledger = opened(database)
    ledger.drop(key(0), reason="judge_refused", detail="judge at http://me:hUsh@judge/v1: no", source_id="a:1")
    ledger.record_event("rollout", "refused_weights", "no s3://id:hUsh@bucket/run")
    with transaction(database) as session:
        assert session.scalars(sa.select(DocumentRow)).one().detail == "judge at http://judge/v1: no"
        assert session.scalars(sa.select(EventRow)).one().message == "no s3://bucket/run"


def test_a_run_is_opened_once_and_events_are_kept(database: Engine) -> None:
    opened(database).open_run({"seed": 2})
    opened(database).record_event("trainer", "resume", "from step 4", step=4)
    with transaction(database) as session:
        assert session.scalars(sa.select(RunRow)).one().settings == {"seed": 1}
        event = session.scalars(sa.select(EventRow)).one()
        assert (event.role, event.kind, event.data) == ("trainer", "resume", {"step": 4})
