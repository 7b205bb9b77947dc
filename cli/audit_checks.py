"""The comparisons of `headwater audit`: each returns the contradictions that it found, in words. No printing."""

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy import Engine

from cli.checkpoint_states import StateFile
from shared.database import DocumentRow, transaction
from shared.ledger import DROPPED, SCORED, TRAINED
from shared.records import DocumentKey

_D = DocumentRow


def gaps(engine: Engine, run_id: str) -> list[str]:
    """Parts and epochs whose positions are not 0, 1, 2, ... and epochs that were skipped."""
    query = (
        sa.select(
            _D.part,
            _D.epoch,
            sa.func.count(sa.distinct(_D.position)),
            sa.func.min(_D.position),
            sa.func.max(_D.position),
        )
        .where(_D.run_id == run_id)
        .group_by(_D.part, _D.epoch)
        .order_by(_D.part, _D.epoch)
    )
    with transaction(engine) as session:
        rows = session.execute(query).all()
    found = [
        f"part {part}, epoch {epoch}: {number} positions between {first} and {last}"
        for part, epoch, number, first, last in rows
        if first != 0 or last + 1 != number
    ]
    for part in sorted({row[0] for row in rows}):
        epochs = [row[1] for row in rows if row[0] == part]
        if epochs != list(range(len(epochs))):
            found.append(f"part {part}: epochs {epochs}")
    return found


def window_gaps(engine: Engine, run_id: str) -> list[str]:
    """Documents whose windows are not 0, 1, 2, ..."""
    number, last = sa.func.count(_D.window), sa.func.max(_D.window)
    query = (
        sa.select(_D.part, _D.epoch, _D.position, number, last)
        .where(_D.run_id == run_id)
        .group_by(_D.part, _D.epoch, _D.position)
        .having(last + 1 != number)
    )
    with transaction(engine) as session:
        rows = session.execute(query).all()
    return [
        f"document {part}.{epoch}.{position}: {count} windows up to number {last_window}"
        for part, epoch, position, count, last_window in rows
    ]


def trained_beyond(engine: Engine, run_id: str, *, newest_step: int) -> list[str]:
    """Trained documents whose step is missing or later than the newest checkpoint's."""
    query = sa.select(_D).where(
        _D.run_id == run_id,
        _D.state == TRAINED,
        sa.or_(_D.trained_step.is_(None), _D.trained_step > newest_step),
    )
    with transaction(engine) as session:
        return [
            f"document {_key(row)} is marked trained at step {row.trained_step}, the newest checkpoint is {newest_step}"
            for row in session.scalars(query)
        ]


def repeated(states: Mapping[int, StateFile]) -> list[str]:
    """Documents that two of the checkpoints at hand both finished."""
    first_seen: dict[str, int] = {}
    found = []
    for step, state in sorted(states.items()):
        for document in state.finished:
            if document in first_seen:
                found.append(f"document {document} at steps {first_seen[document]} and {step}")
            first_seen.setdefault(document, step)
    return found


def unmarked(engine: Engine, run_id: str, states: Mapping[int, StateFile]) -> list[str]:
    """Documents that a checkpoint finished and the database does not say so.

    The newest checkpoint may be a moment ahead of the database: a trainer that died in between marks them when it
    comes back. What a checkpoint has only begun must not count as trained.
    """
    found = []
    newest = max(states, default=0)
    for step, state in sorted(states.items()):
        for document, trained_step in state.finished.items():
            found += _unmarked_document(engine, run_id, document, trained_step, is_newest=step == newest)
    for document in states[newest].partial if states else ():
        row = _row(engine, run_id, document)
        if row is not None and row.state == TRAINED:
            found.append(f"document {document} is marked trained, checkpoint {newest} has only begun it")
    return found


def _unmarked_document(
    engine: Engine, run_id: str, document: str, trained_step: int | None, *, is_newest: bool
) -> list[str]:
    row = _row(engine, run_id, document)
    if row is None:
        return [f"document {document} is in a checkpoint and was never read"]
    wanted = DROPPED if trained_step is None else TRAINED
    if row.state == wanted and (trained_step is None or row.trained_step == trained_step):
        return []
    if is_newest and row.state not in (TRAINED, DROPPED):
        return []
    return [f"document {document} is {row.state} (step {row.trained_step}), its checkpoint says step {trained_step}"]


def scored(engine: Engine, run_id: str) -> set[str]:
    """Ids of documents that are on the stream according to the database."""
    query = sa.select(_D).where(_D.run_id == run_id, _D.state == SCORED)
    with transaction(engine) as session:
        return {_key(row) for row in session.scalars(query)}


def _row(engine: Engine, run_id: str, document: str) -> DocumentRow | None:
    key = DocumentKey.parse(document)
    with transaction(engine) as session:
        row = session.get(DocumentRow, (run_id, key.part, key.epoch, key.position, key.window))
        if row is not None:
            session.expunge(row)
        return row


def _key(row: DocumentRow) -> str:
    return f"{row.part}.{row.epoch}.{row.position}.{row.window}"
