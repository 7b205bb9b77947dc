"""Recorded chunks read back from the database, as the judge saw them. Written by `Run.record_chunks`.

    for chunk in read_recorded(run.database, run.name, limit=200):
        chunk.text[: chunk.text_start]                  # the prefix
        [candidate.text for candidate in chunk.candidates]

Read by `headwater judge-compare` and, for texts of the base policy, by the collector (services/collector/probes.py).
"""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from shared.database import CandidateRow, ChunkRow, WindowTextRow, transaction

_AT_ONCE = 500
"""Rows of one query: databases bound the parameters of a statement."""


@dataclass(frozen=True)
class RecordedCandidate:
    kinds: tuple[str, ...]
    text: str
    weight_version: int | None
    reward: float | None
    barred: bool
    """Below a threshold of the judge: never chosen."""


@dataclass(frozen=True)
class RecordedChunk:
    window_id: str
    start: int
    """In tokens of the window."""
    text: str
    """Of the window. Where it was not kept: the end of the prefix, and the original if it is a candidate."""
    text_start: int
    text_end: int
    """The original suffix is `text[text_start:text_end]`, in characters."""
    has_window: bool
    """Whether `text` is the window's: else the prefix may be shorter than what the judge saw."""
    candidates: tuple[RecordedCandidate, ...]
    fingerprint: str
    num_calls: int
    judge_seconds: float | None

    @property
    def original(self) -> str:
        return self.text[self.text_start : self.text_end]


def read_recorded(database: sa.Engine, run_id: str, *, limit: int, version: int | None = None) -> list[RecordedChunk]:
    """Judged chunks of at least two candidates, evenly from the whole run where there are more than `limit`. `version`:
    only chunks with a rollout of that weight version, the oldest `limit` of them."""
    with transaction(database) as session:
        ids: list[int] = list(session.scalars(_judged(run_id, version)))
        chosen = ids[:limit] if version is not None else _spread(ids, limit)
        batches = [chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE)]
        found = [chunk for batch in batches for chunk in _read(session, run_id, batch)]
    return [chunk for chunk in found if len(chunk.candidates) > 1]


def _judged(run_id: str, version: int | None) -> sa.Select[int]:
    query = sa.select(ChunkRow.id).where(ChunkRow.run_id == run_id, ChunkRow.fingerprint != "")
    if version is not None:
        made = sa.select(CandidateRow.chunk_id).where(CandidateRow.weight_version == version)
        query = query.where(ChunkRow.id.in_(made))
    return query.order_by(ChunkRow.id)


def _spread(ids: list[int], limit: int) -> list[int]:
    return [ids[index * len(ids) // limit] for index in range(limit)] if len(ids) > limit else ids


def _read(session: Session, run_id: str, ids: list[int]) -> list[RecordedChunk]:
    """In the order of `ids`, which ascend."""
    rows = list(session.scalars(sa.select(ChunkRow).where(ChunkRow.id.in_(ids)).order_by(ChunkRow.id)))
    candidates: dict[int, list[RecordedCandidate]] = {row.id: [] for row in rows}
    for made in session.scalars(
        sa.select(CandidateRow).where(CandidateRow.chunk_id.in_(ids)).order_by(CandidateRow.id)
    ):
        candidates[made.chunk_id].append(_candidate(made))
    of_run = sa.select(WindowTextRow).where(WindowTextRow.run_id == run_id)
    shown = session.scalars(of_run.where(WindowTextRow.window_id.in_({row.window_id for row in rows})))
    texts = {window.window_id: window.text for window in shown}
    return [_chunk(row, tuple(candidates[row.id]), texts.get(row.window_id)) for row in rows]


def _chunk(row: ChunkRow, candidates: tuple[RecordedCandidate, ...], window: str | None) -> RecordedChunk:
    return RecordedChunk(
        window_id=row.window_id,
        start=row.start,
        candidates=candidates,
        fingerprint=row.fingerprint,
        num_calls=row.num_calls,
        judge_seconds=row.judge_seconds,
        **_text_of(row, window, candidates),
    )


def _candidate(row: CandidateRow) -> RecordedCandidate:
    kinds = tuple(row.kinds.split(","))
    return RecordedCandidate(kinds, row.text, row.weight_version, row.reward, row.barred)


def _text_of(row: ChunkRow, window: str | None, candidates: tuple[RecordedCandidate, ...]) -> dict[str, Any]:
    if window is not None and row.text_start is not None and row.text_end is not None:
        return {"text": window, "text_start": row.text_start, "text_end": row.text_end, "has_window": True}
    original = next((candidate.text for candidate in candidates if "original" in candidate.kinds), "")
    text, start = row.prefix + original, len(row.prefix)
    return {"text": text, "text_start": start, "text_end": len(text), "has_window": False}
