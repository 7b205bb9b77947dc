"""The ledger: every document window from read to its end, in the `documents` table.

Who writes what: the collector `begin`s a position (all its windows, before any work), then marks each window
`scored` once it is on the stream, or `dropped`. The trainer marks `trained` when a checkpoint that contains the
update is on disk, or `dropped`. So the table is at the same time the cursor (`unfinished`, `next_position`) and the
proof of conservation (`balance`):

    read = trained + dropped (by reason) + in flight
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from shared.database import CursorRow, DocumentRow, EventRow, RunRow, transaction
from shared.records import DocumentKey
from shared.secret_urls import without_secrets

READING, SCORED, TRAINED, DROPPED = "reading", "scored", "trained", "dropped"


@dataclass(frozen=True)
class WindowStart:
    """A window about to be worked on."""

    key: DocumentKey
    source_id: str
    num_tokens: int


@dataclass(frozen=True)
class Position:
    """A place in a part's order: (epoch, position), compared in this order."""

    epoch: int
    position: int

    def __lt__(self, other: "Position") -> bool:
        return (self.epoch, self.position) < (other.epoch, other.position)


@dataclass(frozen=True)
class Balance:
    """The conservation law in numbers of document windows."""

    read: int
    trained: int
    dropped: dict[str, int]
    reading: int
    scored: int

    @property
    def in_flight(self) -> int:
        """Being worked on by a collector, or on the stream, or trained since the last checkpoint."""
        return self.reading + self.scored

    @property
    def holds(self) -> bool:
        return self.read == self.trained + sum(self.dropped.values()) + self.in_flight


@dataclass
class Ledger:
    """One run's documents. Blocking: use it from a thread in async code."""

    engine: Engine
    run_id: str
    _clock: Any = field(default=time.time)

    def open_run(self, settings: dict[str, Any]) -> None:
        """Write the run's row if it isn't there."""
        with transaction(self.engine) as session:
            if session.get(RunRow, self.run_id) is None:
                session.add(RunRow(id=self.run_id, created_at=self._clock(), settings=settings))

    def begin(self, windows: Sequence[WindowStart]) -> None:
        """Rows for all windows of one or more documents, and the cursor behind them: all or none. Repeating it changes
        nothing."""
        num_windows = Counter(_document_of(window.key) for window in windows)
        with transaction(self.engine) as session:
            for window in windows:
                if session.get(DocumentRow, self._primary_key(window.key)) is None:
                    session.add(self._row(window, num_windows=num_windows[_document_of(window.key)]))
                self._advance_cursor(session, window.key)

    def mark_scored(
        self, key: DocumentKey, *, num_chunks: int, num_dropped_chunks: int, policy_version: int | None
    ) -> None:
        """Its scored form is on the stream. A window that the trainer has already finished stays finished."""
        with transaction(self.engine) as session:
            self._update(
                session,
                [key],
                from_states=(READING,),
                state=SCORED,
                num_chunks=num_chunks,
                num_dropped_chunks=num_dropped_chunks,
                policy_version=policy_version,
            )

    def drop(self, key: DocumentKey, *, reason: str, detail: str = "", source_id: str = "") -> None:
        """It will not be trained. Writes the row if a refused line never had one."""
        with transaction(self.engine) as session:
            row = session.get(DocumentRow, self._primary_key(key))
            if row is None:
                row = self._row(WindowStart(key, source_id, 0), num_windows=1)
                session.add(row)
                self._advance_cursor(session, key)
            if row.state == TRAINED:
                raise AssertionError(f"document {key} is trained already and can't be dropped")
            row.state, row.reason, row.finished_at = DROPPED, reason, self._clock()
            row.detail = storable(without_secrets(detail))[:2000]

    def mark_trained(self, steps: dict[str, int]) -> None:
        """`{document id: step}` of windows contained in a checkpoint on disk. Repeating it changes nothing."""
        with transaction(self.engine) as session:
            for step in sorted(set(steps.values())):
                keys = [DocumentKey.parse(text) for text, at in steps.items() if at == step]
                self._update(
                    session,
                    keys,
                    from_states=(READING, SCORED),
                    state=TRAINED,
                    trained_step=step,
                    finished_at=self._clock(),
                )

    def trained_among(self, document_ids: Iterable[str]) -> set[str]:
        """Those that a checkpoint contains, or that were dropped: a repeat of them must not be trained."""
        found = set()
        with transaction(self.engine) as session:
            for text in document_ids:
                row = session.get(DocumentRow, self._primary_key(DocumentKey.parse(text)))
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

    def unfinished(self, part: int, *, on_stream: set[str]) -> dict[Position, set[int]]:
        """Windows by position that must be worked on again: read, but neither finished nor on the stream.

        `scored` rows that are not on the stream are among them: a Redis that lost its file loses no document.
        """
        with transaction(self.engine) as session:
            rows = session.scalars(
                sa.select(DocumentRow).where(
                    DocumentRow.run_id == self.run_id,
                    DocumentRow.part == part,
                    DocumentRow.state.in_((READING, SCORED)),
                )
            ).all()
            found: dict[Position, set[int]] = {}
            for row in rows:
                key = DocumentKey(part=row.part, epoch=row.epoch, position=row.position, window=row.window)
                if str(key) not in on_stream:
                    found.setdefault(Position(row.epoch, row.position), set()).add(row.window)
        return found

    def mark_found(self, part: int, *, on_stream: set[str]) -> int:
        """Windows of the part that are `reading` though their scored form is on the stream become `scored`.

        Their collector ended between the write and `mark_scored`; how many chunks they have, only the entry knows.
        """
        with transaction(self.engine) as session:
            rows = session.scalars(
                sa.select(DocumentRow).where(
                    DocumentRow.run_id == self.run_id, DocumentRow.part == part, DocumentRow.state == READING
                )
            ).all()
            found = [
                key
                for row in rows
                if str(key := DocumentKey(part=part, epoch=row.epoch, position=row.position, window=row.window))
                in on_stream
            ]
            self._update(session, found, from_states=(READING,), state=SCORED)
        return len(found)

    def balance(self) -> Balance:
        with transaction(self.engine) as session:
            rows = session.execute(
                sa.select(DocumentRow.state, DocumentRow.reason, sa.func.count())
                .where(DocumentRow.run_id == self.run_id)
                .group_by(DocumentRow.state, DocumentRow.reason)
            ).all()
            read = session.scalar(
                sa.select(sa.func.count()).select_from(DocumentRow).where(DocumentRow.run_id == self.run_id)
            )
        by_state = {state: sum(n for s, _, n in rows if s == state) for state in (READING, SCORED, TRAINED)}
        return Balance(
            read=read or 0,
            trained=by_state[TRAINED],
            dropped={reason: n for state, reason, n in rows if state == DROPPED},
            reading=by_state[READING],
            scored=by_state[SCORED],
        )

    def record_event(self, role: str, kind: str, message: str, **data: Any) -> None:
        with transaction(self.engine) as session:
            session.add(
                EventRow(
                    run_id=self.run_id,
                    at=self._clock(),
                    role=role,
                    kind=kind,
                    message=without_secrets(message)[:2000],
                    data=data,
                )
            )

    def _primary_key(self, key: DocumentKey) -> tuple[str, int, int, int, int]:
        return (self.run_id, key.part, key.epoch, key.position, key.window)

    def _advance_cursor(self, session: Session, key: DocumentKey) -> None:
        cursor = session.get(CursorRow, (self.run_id, key.part, key.epoch))
        if cursor is None:
            cursor = CursorRow(run_id=self.run_id, part=key.part, epoch=key.epoch, num_positions=0)
            session.add(cursor)
        cursor.num_positions = max(cursor.num_positions, key.position + 1)

    def _row(self, window: WindowStart, *, num_windows: int) -> DocumentRow:
        return DocumentRow(
            run_id=self.run_id,
            **window.key.model_dump(),
            source_id=storable(window.source_id),
            num_windows=num_windows,
            num_tokens=window.num_tokens,
            read_at=self._clock(),
            state=READING,
        )

    def _update(
        self, session: Session, keys: Sequence[DocumentKey], *, from_states: Sequence[str], **values: Any
    ) -> None:
        for key in keys:
            session.execute(
                sa.update(DocumentRow)
                .where(
                    DocumentRow.run_id == self.run_id,
                    DocumentRow.part == key.part,
                    DocumentRow.epoch == key.epoch,
                    DocumentRow.position == key.position,
                    DocumentRow.window == key.window,
                    DocumentRow.state.in_(from_states),
                )
                .values(**values)
            )


def _document_of(key: DocumentKey) -> tuple[int, int, int]:
    return key.part, key.epoch, key.position


def storable(text: str) -> str:
    """PostgreSQL's text can't hold a NUL character, which documents may."""
    return text.replace("\x00", "\ufffd")
