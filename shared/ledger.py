"""The ledger: every window from reading to its end, in the `windows` table.

    collector   begin            before any work: the windows of a document, and the cursor behind them
                mark_scored      it is on the stream
                drop             it won't be trained, with a reason
    trainer     mark_trained     a checkpoint that contains it is on disk
                drop

The table answers two questions: where to read on (`unfinished`, `next_position`), and what became of every window
(`balance`):

    read = trained + dropped (by reason) + in flight

Collectors and the trainer write under a lease (shared/records.py). Each such transaction begins with an update of the
part's row that matches only the lease's number. On both databases this locks the row (on SQLite the whole file) until
the transaction ends, so nobody can take the part between the check and the write.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from shared.database import MAX_TEXT, CursorRow, EventRow, PartRow, WindowRow, insert_if_absent, storable, transaction
from shared.errors import FencedError
from shared.records import Lease, WindowKey
from shared.secret_urls import without_secrets

READING, SCORED, TRAINED, DROPPED = "reading", "scored", "trained", "dropped"


@dataclass(frozen=True)
class WindowStart:
    key: WindowKey
    source_id: str
    num_tokens: int


@dataclass(frozen=True)
class Position:
    epoch: int
    position: int


@dataclass(frozen=True)
class Balance:
    read: int
    trained: int
    dropped: dict[str, int]
    reading: int
    scored: int

    @property
    def in_flight(self) -> int:
        return self.reading + self.scored


@dataclass
class Ledger:
    """One run's windows. Blocking: use it from a thread in async code.

    Methods that write raise FencedError, and change nothing, once somebody else has taken the part of their lease.
    """

    database: sa.Engine
    run_id: str
    lease: Lease | None = None
    """The trainer's. A collector has several parts and gives a lease with each call."""

    def lease_epoch(self, part: int) -> int:
        with transaction(self.database) as session:
            row = session.get(PartRow, (self.run_id, part))
            return 0 if row is None else row.lease_epoch

    def take_part(self, part: int, *, after: int) -> int:
        """The fencing number of a new lease: writes under an earlier one are refused. FencedError if another collector
        has taken the part since its number was `after`."""
        with transaction(self.database) as session:
            insert_if_absent(session, PartRow, run_id=self.run_id, part=part, lease_epoch=0)
            self._move_epoch(session, part, after, after + 1)
        return after + 1

    def refuse_if_fenced(self, session: Session, lease: Lease | None) -> None:
        """First in a transaction: nobody else takes the part until it ends. FencedError if somebody has."""
        if lease is not None:
            self._move_epoch(session, lease.part, lease.epoch, lease.epoch)

    def confirm(self) -> None:
        """FencedError if another trainer has taken over."""
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, self.lease)

    def _move_epoch(self, session: Session, part: int, expected: int, epoch: int) -> None:
        held = session.execute(
            sa.update(PartRow)
            .where(PartRow.run_id == self.run_id, PartRow.part == part, PartRow.lease_epoch == expected)
            .values(lease_epoch=epoch)
        )
        if not _num_rows(held):
            raise FencedError(Lease(part, "", expected).loss)

    def begin(self, windows: Sequence[WindowStart], lease: Lease | None = None) -> None:
        """Rows for all windows of documents, and the cursor behind them. Repeating it changes nothing."""
        documents = [(window.key.part, window.key.epoch, window.key.position) for window in windows]
        num_windows = Counter(documents)
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            for window, document in zip(windows, documents, strict=True):
                if session.get(WindowRow, self._primary_key(window.key)) is None:
                    session.add(self._row(window, num_windows=num_windows[document], **_worked_on(lease)))
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
        """It won't be trained. Also writes the row, for a refused line that never had one. One dropped before keeps its
        reason. False if it is trained: it stays so, with an event."""
        outcome = {
            "state": DROPPED,
            "reason": reason,
            "detail": storable(without_secrets(detail))[:MAX_TEXT],
            "finished_at": time.time(),
            **_worked_on(lease),
        }
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease or self.lease)
            if self._update(session, [key], from_states=(READING, SCORED), **outcome):
                return True
            row = session.get(WindowRow, self._primary_key(key))
            if row is None:
                row = self._row(WindowStart(key, source_id, 0), num_windows=1, **outcome)
                session.add(row)
                self._advance_cursor(session, key)
            elif row.state == TRAINED:
                role = "collector" if lease else "trainer"
                message = f"window {key} was to be dropped ({reason}), but a checkpoint contains it: it stays trained"
                session.add(EventRow.of(self.run_id, role, "kept_trained", message, window=str(key), reason=reason))
            return row.state == DROPPED

    def mark_trained(self, steps: Mapping[str, int], *, num_pairs: Mapping[str, int] = MappingProxyType({})) -> None:
        """`{window id: step}` and `{window id: pairs in updates}` of windows in a checkpoint. May be repeated."""
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, self.lease)
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
        with transaction(self.database) as session:
            rows = {id_: session.get(WindowRow, self._primary_key(WindowKey.parse(id_))) for id_ in window_ids}
            return {id_ for id_, row in rows.items() if row is not None and row.state in (TRAINED, DROPPED)}

    def next_position(self, part: int) -> Position:
        """The first place in the part that was never read."""
        cursors = sa.select(CursorRow).where(CursorRow.run_id == self.run_id, CursorRow.part == part)
        with transaction(self.database) as session:
            newest = session.scalars(cursors.order_by(CursorRow.epoch.desc()).limit(1)).first()
            return Position(newest.epoch, newest.num_positions) if newest else Position(0, 0)

    def source_id(self, part: int, position: Position) -> str:
        document = {"run_id": self.run_id, "part": part, "epoch": position.epoch, "position": position.position}
        with transaction(self.database) as session:
            return session.scalars(sa.select(WindowRow.source_id).filter_by(**document).limit(1)).one()

    def unfinished(self, part: int, *, on_stream: set[str]) -> dict[Position, set[int]]:
        """Windows by position that must be worked on again: neither finished nor on the stream. They include `scored`
        ones: a Redis that lost its data loses no window."""
        found: dict[Position, set[int]] = {}
        with transaction(self.database) as session:
            for key in self._keys(session, part, (READING, SCORED)):
                if str(key) not in on_stream:
                    found.setdefault(Position(key.epoch, key.position), set()).add(key.window)
        return found

    def mark_found(self, part: int, *, on_stream: set[str], lease: Lease | None = None) -> int:
        """Mark the part's windows `scored` that are `reading` although on the stream; returns how many. Their collector
        stopped between the write and `mark_scored`. Their number of chunks stays unknown."""
        with transaction(self.database) as session:
            self.refuse_if_fenced(session, lease)
            found = [key for key in self._keys(session, part, (READING,)) if str(key) in on_stream]
            self._update(session, found, from_states=(READING,), state=SCORED, **_worked_on(lease))
        return len(found)

    def balance(self) -> Balance:
        what = (WindowRow.state, WindowRow.reason)
        counted = sa.select(*what, sa.func.count()).where(WindowRow.run_id == self.run_id).group_by(*what)
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
        of_part = sa.select(*place).filter_by(run_id=self.run_id, part=part)
        return [WindowKey(**row._mapping) for row in session.execute(of_part.where(WindowRow.state.in_(states)))]

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
        """How many rows are changed."""
        change = sa.update(WindowRow).where(WindowRow.state.in_(from_states)).values(**values)
        places = (key.model_dump() for key in keys)
        return sum(_num_rows(session.execute(change.filter_by(run_id=self.run_id, **place))) for place in places)


def _num_rows(answer: sa.Result[Any]) -> int:
    return cast(sa.CursorResult[Any], answer).rowcount


def _worked_on(lease: Lease | None) -> dict[str, int]:
    return {} if lease is None else {"lease_epoch": lease.epoch}
