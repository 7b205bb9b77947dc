"""The ledger: every window from reading to its end, in the `windows` table.

    collector   begin            before any work: the windows of a document, and the cursor behind them
                mark_scored      it is on the stream
                drop             it won't be trained, with a reason
    trainer     mark_trained     a checkpoint that contains it is on disk
                drop

The table answers two questions: where to read on (`unfinished`, `next_position`), and what became of every window
(`balance`):

    read = trained + dropped (by reason) + in flight

`headwater audit` compares it with the cursors, the checkpoints and the stream.

A collector writes under its lease (shared/records.py). Each of its transactions begins with an update of the part's
row that matches only the lease's number. On both databases this locks the row (on SQLite the whole file) until the
transaction ends, so nobody can take the part between the check and the write.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from shared.database import (
    MAX_TEXT,
    CursorRow,
    EventRow,
    PartRow,
    WindowRow,
    insert_if_absent,
    storable,
    transaction,
)
from shared.errors import FencedError
from shared.records import Lease, WindowKey
from shared.secret_urls import without_secrets

READING, SCORED, TRAINED, DROPPED = "reading", "scored", "trained", "dropped"


@dataclass(frozen=True)
class WindowStart:
    """A window about to be worked on."""

    key: WindowKey
    source_id: str
    num_tokens: int


@dataclass(frozen=True)
class Position:
    """A place in a part's order of reading."""

    epoch: int
    position: int


@dataclass(frozen=True)
class Balance:
    """How many windows are in each state by the table alone."""

    read: int
    trained: int
    dropped: dict[str, int]
    """By reason."""
    reading: int
    scored: int

    @property
    def in_flight(self) -> int:
        """With a collector, on the stream, or trained since the last checkpoint."""
        return self.reading + self.scored


@dataclass
class Ledger:
    """One run's windows. Blocking: use it from a thread in async code.

    Methods with a `lease` raise FencedError, and change nothing, once another collector has taken the part. A caller
    that holds no part, such as the trainer, gives None.
    """

    database: sa.Engine
    run_id: str

    def lease_epoch(self, part: int) -> int:
        """The newest fencing number of the part; 0 before it was first taken."""
        with transaction(self.database) as session:
            row = session.get(PartRow, (self.run_id, part))
            return 0 if row is None else row.lease_epoch

    def take_part(self, part: int, *, after: int) -> int:
        """The fencing number of a new lease; from now on writes under an earlier one are refused.

        `after` is the number read before. FencedError if it has risen since: another collector has taken the part.
        """
        with transaction(self.database) as session:
            insert_if_absent(session, PartRow, run_id=self.run_id, part=part, lease_epoch=0)
            self._move_epoch(session, part, after, after + 1)
        return after + 1

    def refuse_if_fenced(self, session: Session, lease: Lease | None) -> None:
        """Comes first in a transaction: nobody else takes the part until it ends. FencedError if somebody has."""
        if lease is not None:
            self._move_epoch(session, lease.part, lease.epoch, lease.epoch)

    def _move_epoch(self, session: Session, part: int, expected: int, epoch: int) -> None:
        held = session.execute(
            sa.update(PartRow)
            .where(PartRow.run_id == self.run_id, PartRow.part == part, PartRow.lease_epoch == expected)
            .values(lease_epoch=epoch)
        )
        if not _num_rows(held):
            raise FencedError(f"part {part} was taken by another collector after lease number {expected}")

    def begin(self, windows: Sequence[WindowStart], lease: Lease | None = None) -> None:
        """Rows for all windows of one or more documents, and the cursor behind them: all or none. Repeating it changes
        nothing."""
        num_windows = Counter(_document_of(window.key) for window in windows)
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            for window in windows:
                if session.get(WindowRow, self._primary_key(window.key)) is None:
                    session.add(
                        self._row(window, num_windows=num_windows[_document_of(window.key)], **_worked_on(lease))
                    )
                self._advance_cursor(session, window.key)

    def mark_scored(
        self,
        key: WindowKey,
        *,
        num_chunks: int,
        num_dropped_chunks: int,
        weight_version: int | None,
        lease: Lease | None = None,
    ) -> None:
        """It is on the stream. A window that the trainer has finished stays finished."""
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            self._update(
                session,
                [key],
                from_states=(READING,),
                state=SCORED,
                num_chunks=num_chunks,
                num_dropped_chunks=num_dropped_chunks,
                weight_version=weight_version,
                **_worked_on(lease),
            )

    def drop(
        self, key: WindowKey, *, reason: str, detail: str = "", source_id: str = "", lease: Lease | None = None
    ) -> bool:
        """It won't be trained. Also writes the row, for a refused line that never had one.

        False if it is trained: it stays so, with an event. A dropped one keeps its first reason.
        """
        outcome = {
            "state": DROPPED,
            "reason": reason,
            "detail": storable(without_secrets(detail))[:MAX_TEXT],
            "finished_at": time.time(),
            **_worked_on(lease),
        }
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            if self._update(session, [key], from_states=(READING, SCORED), **outcome):
                return True
            row = session.get(WindowRow, self._primary_key(key))
            if row is None:
                row = self._row(WindowStart(key, source_id, 0), num_windows=1, **outcome)
                session.add(row)
                self._advance_cursor(session, key)
            elif row.state == TRAINED:
                session.add(self._kept_trained(key, reason, role="collector" if lease else "trainer"))
            return row.state == DROPPED

    def _kept_trained(self, key: WindowKey, reason: str, *, role: str) -> EventRow:
        message = f"window {key} was to be dropped ({reason}), but a checkpoint contains it: it stays trained"
        return EventRow.of(self.run_id, role, "kept_trained", message, window=str(key), reason=reason)

    def mark_trained(self, steps: Mapping[str, int], *, num_pairs: Mapping[str, int] = MappingProxyType({})) -> None:
        """`{window id: step}` and `{window id: pairs in updates}` of windows that a checkpoint on disk contains.
        Repeating it changes nothing."""
        with transaction(self.database) as session:
            for window_id, step in steps.items():
                self._update(
                    session,
                    [WindowKey.parse(window_id)],
                    from_states=(READING, SCORED),
                    state=TRAINED,
                    trained_step=step,
                    num_pairs=num_pairs.get(window_id),
                    finished_at=time.time(),
                )

    def finished_among(self, window_ids: Iterable[str]) -> set[str]:
        """Those that are trained or dropped: a second delivery of them must not be trained."""
        found = set()
        with transaction(self.database) as session:
            for window_id in window_ids:
                row = session.get(WindowRow, self._primary_key(WindowKey.parse(window_id)))
                if row is not None and row.state in (TRAINED, DROPPED):
                    found.add(window_id)
        return found

    def next_position(self, part: int) -> Position:
        """The first place in the part that was never read."""
        newest_first = (
            sa.select(CursorRow)
            .where(CursorRow.run_id == self.run_id, CursorRow.part == part)
            .order_by(CursorRow.epoch.desc())
        )
        with transaction(self.database) as session:
            newest = session.scalars(newest_first.limit(1)).first()
            return Position(newest.epoch, newest.num_positions) if newest else Position(0, 0)

    def source_id(self, part: int, position: Position) -> str:
        """Of the document that was read there."""
        windows = sa.select(WindowRow.source_id).where(
            WindowRow.run_id == self.run_id,
            WindowRow.part == part,
            WindowRow.epoch == position.epoch,
            WindowRow.position == position.position,
        )
        with transaction(self.database) as session:
            return session.scalars(windows.limit(1)).one()

    def unfinished(self, part: int, *, on_stream: set[str]) -> dict[Position, set[int]]:
        """Windows by position that must be worked on again: neither finished nor on the stream.

        They include `scored` ones: a Redis that lost its data loses no window.
        """
        found: dict[Position, set[int]] = {}
        with transaction(self.database) as session:
            for key in self._keys(session, part, (READING, SCORED)):
                if str(key) not in on_stream:
                    found.setdefault(Position(key.epoch, key.position), set()).add(key.window)
        return found

    def mark_found(self, part: int, *, on_stream: set[str], lease: Lease | None = None) -> int:
        """Make windows of the part `scored` that are `reading` although they are on the stream. Returns how many.

        Their collector stopped between the write and `mark_scored`. Their number of chunks stays unknown.
        """
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            found = [key for key in self._keys(session, part, (READING,)) if str(key) in on_stream]
            self._update(session, found, from_states=(READING,), state=SCORED, **_worked_on(lease))
        return len(found)

    def balance(self) -> Balance:
        counted = (
            sa.select(WindowRow.state, WindowRow.reason, sa.func.count())
            .where(WindowRow.run_id == self.run_id)
            .group_by(WindowRow.state, WindowRow.reason)
        )
        with transaction(self.database) as session:
            rows = session.execute(counted).all()
        by_state: Counter[str] = Counter()
        for state, _, number in rows:
            by_state[state] += number
        return Balance(
            read=by_state.total(),
            trained=by_state[TRAINED],
            dropped={reason: number for state, reason, number in rows if state == DROPPED},
            reading=by_state[READING],
            scored=by_state[SCORED],
        )

    def _keys(self, session: Session, part: int, states: Sequence[str]) -> list[WindowKey]:
        place = (WindowRow.part, WindowRow.epoch, WindowRow.position, WindowRow.window)
        rows = session.execute(
            sa.select(*place).where(
                WindowRow.run_id == self.run_id, WindowRow.part == part, WindowRow.state.in_(states)
            )
        )
        return [WindowKey(**row._mapping) for row in rows]

    def _primary_key(self, key: WindowKey) -> tuple[str, int, int, int, int]:
        return (self.run_id, key.part, key.epoch, key.position, key.window)

    def _advance_cursor(self, session: Session, key: WindowKey) -> None:
        cursor = session.get(CursorRow, (self.run_id, key.part, key.epoch))
        if cursor is None:
            cursor = CursorRow(run_id=self.run_id, part=key.part, epoch=key.epoch, num_positions=0)
            session.add(cursor)
        cursor.num_positions = max(cursor.num_positions, key.position + 1)

    def _row(self, window: WindowStart, *, num_windows: int, **values: Any) -> WindowRow:
        return WindowRow(
            run_id=self.run_id,
            **window.key.model_dump(),
            source_id=storable(window.source_id),
            num_windows=num_windows,
            num_tokens=window.num_tokens,
            read_at=time.time(),
            **({"state": READING} | values),
        )

    def _update(self, session: Session, keys: Sequence[WindowKey], *, from_states: Sequence[str], **values: Any) -> int:
        """How many rows were in one of `from_states`, and are changed."""
        num_changed = 0
        for key in keys:
            changed = session.execute(
                sa.update(WindowRow)
                .where(
                    WindowRow.run_id == self.run_id,
                    WindowRow.part == key.part,
                    WindowRow.epoch == key.epoch,
                    WindowRow.position == key.position,
                    WindowRow.window == key.window,
                    WindowRow.state.in_(from_states),
                )
                .values(**values)
            )
            num_changed += _num_rows(changed)
        return num_changed


def _num_rows(answer: sa.Result[Any]) -> int:
    return cast(sa.CursorResult[Any], answer).rowcount


def _worked_on(lease: Lease | None) -> dict[str, int]:
    return {} if lease is None else {"lease_epoch": lease.epoch}


def _document_of(key: WindowKey) -> tuple[int, int, int]:
    return key.part, key.epoch, key.position
