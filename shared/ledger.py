"""The ledger: every document window from read to its end, in the `documents` table.

Who writes what: the collector `begin`s a position (all its windows, before any work), then marks each window
`scored` once it is on the stream, or `dropped`. The trainer marks `trained` when a checkpoint that contains the
update is on disk, or `dropped`. So the table is at the same time the cursor (`unfinished`, `next_position`) and the
account of every window (`balance`):

    read = trained + dropped (by reason) + in flight

That nothing is missing from it is proved by `headwater audit`, against the cursors, the checkpoints and the stream.

A collector writes under its lease (shared/records.py): the first statement of each of its transactions is an update of
the part's row that finds it only under the lease's number. On both databases that holds the row, or on SQLite the
whole file, until the transaction ends, so nobody can take the part between the check and the write.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import (
    CursorRow,
    EventRow,
    PartRow,
    RunRow,
    WeightVersionRow,
    WindowRow,
    insert_if_absent,
    transaction,
    translated,
)
from shared.errors import FencedError
from shared.records import Lease, WindowKey
from shared.runs import Manifest, refuse_changed_identity, refuse_changed_source
from shared.secret_urls import without_secrets

READING, SCORED, TRAINED, DROPPED = "reading", "scored", "trained", "dropped"


@dataclass(frozen=True)
class WindowStart:
    """A window about to be worked on."""

    key: WindowKey
    source_id: str
    num_tokens: int


@dataclass(frozen=True)
class RunStart:
    """What a run's first processes wrote down."""

    settings: dict[str, Any]
    source: dict[str, Any] | None
    """`Manifest.stored` of its documents; None until a collector has opened them."""


@dataclass(frozen=True)
class Position:
    """A place in a part's order: (epoch, position), compared in this order."""

    epoch: int
    position: int

    def __lt__(self, other: "Position") -> bool:
        return (self.epoch, self.position) < (other.epoch, other.position)


@dataclass(frozen=True)
class Balance:
    """Document windows by state, as the table counts them. It proves nothing: `headwater audit` does, from what others
    know about the same windows."""

    read: int
    trained: int
    dropped: dict[str, int]
    reading: int
    scored: int

    @property
    def in_flight(self) -> int:
        """Being worked on by a collector, or on the stream, or trained since the last checkpoint."""
        return self.reading + self.scored


@dataclass
class Ledger:
    """One run's documents. Blocking: use it from a thread in async code.

    Methods with a `lease` raise FencedError, and change nothing, once another collector has taken the part; None is a
    caller that holds no part, such as the trainer.
    """

    engine: Engine
    run_id: str
    _clock: Any = field(default=time.time)

    def open_run(self, settings: dict[str, Any]) -> None:
        """Write the run's row if it isn't there. SettingsError if it is there with another identity."""
        with transaction(self.engine) as session:
            insert_if_absent(session, RunRow, id=self.run_id, created_at=self._clock(), settings=settings)
            began_with = session.scalars(sa.select(RunRow.settings).where(RunRow.id == self.run_id)).one()
        refuse_changed_identity(began_with, settings, run=f"{self.run_id!r} of this database")

    def adopt_source(self, manifest: Manifest) -> None:
        """Keep what the run's documents are, or compare with what is kept: SourceError when they have changed."""
        of_run = sa.update(RunRow).where(RunRow.id == self.run_id)
        with transaction(self.engine) as session:
            session.execute(of_run.where(RunRow.source.is_(sa.null())).values(source=manifest.stored()))
            kept = session.scalars(sa.select(RunRow.source).where(RunRow.id == self.run_id)).one()
        refuse_changed_source(kept, manifest, run=self.run_id)

    def extent(self, *, max_epochs: int) -> str:
        """How much of which documents a start of the run reads: what a part's end is true for."""
        with transaction(self.engine) as session:
            digest = session.scalar(sa.select(RunRow.source["digest"].as_string()).where(RunRow.id == self.run_id))
        return f"{max_epochs} epochs of documents {digest}"

    def began_with(self) -> "RunStart | None":
        """None if this database does not have the run. Writes nothing, and reads schemas older than this version."""
        inspector = sa.inspect(self.engine)
        with translated():
            if not inspector.has_table(RunRow.__tablename__):
                return None
            columns = {column["name"] for column in inspector.get_columns(RunRow.__tablename__)}
        source = RunRow.source if "source" in columns else sa.null()
        with transaction(self.engine) as session:
            found = session.execute(sa.select(RunRow.settings, source).where(RunRow.id == self.run_id)).first()
        return None if found is None else RunStart(*found)

    def lease_epoch(self, part: int) -> int:
        """The newest fencing number of the part; 0 before it was ever taken."""
        with transaction(self.engine) as session:
            row = session.get(PartRow, (self.run_id, part))
            return 0 if row is None else row.lease_epoch

    def take_part(self, part: int, *, after: int) -> int:
        """The fencing number of a new lease: rows are not written under an earlier one from here on.

        `after`: the number that was read before. FencedError if it has risen since: another has taken the part.
        """
        with transaction(self.engine) as session:
            insert_if_absent(session, PartRow, run_id=self.run_id, part=part, lease_epoch=0)
            self._move_epoch(session, part, after, after + 1)
        return after + 1

    def refuse_if_fenced(self, session: Session, lease: Lease | None) -> None:
        """First in a transaction: until it ends nobody else takes the part. Raises FencedError if somebody has."""
        if lease is None:
            return
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
        with transaction(self.engine) as session:
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
        """Its scored form is on the stream. A window that the trainer has already finished stays finished."""
        with transaction(self.engine) as session:
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
        """It will not be trained. Writes the row if a refused line never had one.

        False if it is trained: it stays so, and an event tells. A dropped one keeps its first reason.
        """
        outcome = {
            "state": DROPPED,
            "reason": reason,
            "detail": storable(without_secrets(detail))[:2000],
            "finished_at": self._clock(),
            **_worked_on(lease),
        }
        with transaction(self.engine) as session:
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

    def mark_trained(self, steps: Mapping[str, int], *, num_pairs: Mapping[str, int] = MappingProxyType({})) -> None:
        """`{document id: step}` of windows contained in a checkpoint on disk. Repeating it changes nothing.

        `num_pairs`: how many of its pairs are in updates; a window is missing there where the checkpoint is from before
        this was counted.
        """
        with transaction(self.engine) as session:
            for text, step in steps.items():
                self._update(
                    session,
                    [WindowKey.parse(text)],
                    from_states=(READING, SCORED),
                    state=TRAINED,
                    trained_step=step,
                    num_pairs=num_pairs.get(text),
                    finished_at=self._clock(),
                )

    def trained_among(self, window_ids: Iterable[str]) -> set[str]:
        """Those that a checkpoint contains, or that were dropped: a repeat of them must not be trained."""
        found = set()
        with transaction(self.engine) as session:
            for text in window_ids:
                row = session.get(WindowRow, self._primary_key(WindowKey.parse(text)))
                if row is not None and row.state in (TRAINED, DROPPED):
                    found.add(text)
        return found

    def next_position(self, part: int) -> Position:
        """The first place in the part that was never read."""
        with transaction(self.engine) as session:
            newest = session.scalars(
                sa.select(CursorRow)
                .where(CursorRow.run_id == self.run_id, CursorRow.part == part)
                .order_by(CursorRow.epoch.desc())
                .limit(1)
            ).first()
            return Position(newest.epoch, newest.num_positions) if newest else Position(0, 0)

    def source_id(self, part: int, position: Position) -> str:
        """Of the document that was read at a position which has rows."""
        with transaction(self.engine) as session:
            found = session.scalars(
                sa.select(WindowRow.source_id)
                .where(
                    WindowRow.run_id == self.run_id,
                    WindowRow.part == part,
                    WindowRow.epoch == position.epoch,
                    WindowRow.position == position.position,
                )
                .limit(1)
            )
            return found.one()

    def unfinished(self, part: int, *, on_stream: set[str]) -> dict[Position, set[int]]:
        """Windows by position that must be worked on again: read, but neither finished nor on the stream.

        `scored` rows that are not on the stream are among them: a Redis that lost its file loses no document.
        """
        with transaction(self.engine) as session:
            rows = session.scalars(
                sa.select(WindowRow).where(
                    WindowRow.run_id == self.run_id,
                    WindowRow.part == part,
                    WindowRow.state.in_((READING, SCORED)),
                )
            ).all()
            found: dict[Position, set[int]] = {}
            for row in rows:
                key = WindowKey(part=row.part, epoch=row.epoch, position=row.position, window=row.window)
                if str(key) not in on_stream:
                    found.setdefault(Position(row.epoch, row.position), set()).add(row.window)
        return found

    def mark_found(self, part: int, *, on_stream: set[str], lease: Lease | None = None) -> int:
        """Windows of the part that are `reading` though their scored form is on the stream become `scored`.

        Their collector ended between the write and `mark_scored`; how many chunks they have, only the entry knows.
        """
        with transaction(self.engine) as session:
            self.refuse_if_fenced(session, lease)
            rows = session.scalars(
                sa.select(WindowRow).where(
                    WindowRow.run_id == self.run_id, WindowRow.part == part, WindowRow.state == READING
                )
            ).all()
            found = [
                key
                for row in rows
                if str(key := WindowKey(part=part, epoch=row.epoch, position=row.position, window=row.window))
                in on_stream
            ]
            self._update(session, found, from_states=(READING,), state=SCORED, **_worked_on(lease))
        return len(found)

    def balance(self) -> Balance:
        with transaction(self.engine) as session:
            rows = session.execute(
                sa.select(WindowRow.state, WindowRow.reason, sa.func.count())
                .where(WindowRow.run_id == self.run_id)
                .group_by(WindowRow.state, WindowRow.reason)
            ).all()
            read = session.scalar(
                sa.select(sa.func.count()).select_from(WindowRow).where(WindowRow.run_id == self.run_id)
            )
        by_state = {state: sum(n for s, _, n in rows if s == state) for state in (READING, SCORED, TRAINED)}
        return Balance(
            read=read or 0,
            trained=by_state[TRAINED],
            dropped={reason: n for state, reason, n in rows if state == DROPPED},
            reading=by_state[READING],
            scored=by_state[SCORED],
        )

    def newest_weight_version(self) -> int:
        """The newest that was ever published; 0 before the first."""
        with transaction(self.engine) as session:
            newest = sa.select(sa.func.max(WeightVersionRow.version)).where(WeightVersionRow.run_id == self.run_id)
            return session.scalar(newest) or 0

    def record_event(self, role: str, kind: str, message: str, **data: Any) -> None:
        with transaction(self.engine) as session:
            session.add(self._event(role, kind, message, **data))

    def _event(self, role: str, kind: str, message: str, **data: Any) -> EventRow:
        return EventRow(
            run_id=self.run_id,
            at=self._clock(),
            role=role,
            kind=kind,
            message=storable(without_secrets(message))[:2000],
            data=data,
        )

    def _kept_trained(self, key: WindowKey, reason: str, *, role: str) -> EventRow:
        message = f"document {key} was to be dropped ({reason}), but a checkpoint contains it: it stays trained"
        return self._event(role, "kept_trained", message, document=str(key), reason=reason)

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
            read_at=self._clock(),
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


def storable(text: str) -> str:
    """PostgreSQL's text can't hold a NUL character, and no database half a surrogate pair; documents may."""
    return text.replace("\x00", "\ufffd").encode(errors="backslashreplace").decode()
