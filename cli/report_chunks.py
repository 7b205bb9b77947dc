"""The part of `headwater report` that shows how the judge compared candidates: those of the newest recorded chunks."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from shared.database import CandidateRow, ChunkRow, transaction

_NEWEST_CHUNKS = 3
_SHOWN_CHARACTERS = 160
"""Of a candidate; of a prefix its end."""
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#!$~])")


def comparison_lines(database: sa.Engine, run_id: str) -> list[str]:
    """Per chunk its candidates and every comparison in order: what was shown first, and who beat whom by how much."""
    if "comparisons" not in {column["name"] for column in sa.inspect(database).get_columns(ChunkRow.__tablename__)}:
        return ["None: this run's database has an earlier schema."]
    compared = ChunkRow.comparisons.is_not(sa.null())
    query = sa.select(ChunkRow).where(ChunkRow.run_id == run_id, compared)
    lines: list[str] = []
    with transaction(database) as session:
        for chunk in session.scalars(query.order_by(ChunkRow.id.desc()).limit(_NEWEST_CHUNKS)):
            of_chunk = sa.select(CandidateRow).where(CandidateRow.chunk_id == chunk.id).order_by(CandidateRow.id)
            lines += [*_chunk_lines(chunk, session.scalars(of_chunk).all()), ""]
    return lines or ["None: no recorded chunk was judged in pairs (`collector.record_share` sets how many are kept)."]


def _chunk_lines(chunk: ChunkRow, candidates: Sequence[CandidateRow]) -> Iterator[str]:
    yield f"### Window {chunk.window_id}, suffix from token {chunk.start}"
    yield ""
    yield f"Prefix: … {_shown(chunk.prefix[-_SHOWN_CHARACTERS:])}"
    yield ""
    yield "| candidate | made by | reward | text |"
    yield "|---:|---|---:|---|"
    for number, candidate in enumerate(candidates, start=1):
        reward = "unscored" if candidate.reward is None else f"{candidate.reward:.3f}"
        barred = ", barred" if candidate.barred else ""
        text = _shown(candidate.text[:_SHOWN_CHARACTERS])
        yield f"| {number} | {candidate.kinds.replace(',', ', ')} | {reward}{barred} | {text} |"
    yield ""
    yield "| question | criterion | shown first | shown second | value of the first | outcome |"
    yield "|---:|---|---:|---:|---:|---|"
    for number, comparison in enumerate(chunk.comparisons or [], start=1):
        yield f"| {number} | {' | '.join(_comparison_cells(comparison))} |"


def _comparison_cells(comparison: Sequence[Any]) -> Iterator[str]:
    criterion, first, second, value = comparison
    yield from (str(criterion), str(first + 1), str(second + 1))
    if value is None:
        yield from ("", "no readable verdict")
        return
    yield f"{value:.3f}"
    winner, loser = (first, second) if value > 0.5 else (second, first)
    yield "tie" if value == 0.5 else f"{winner + 1} beats {loser + 1}"


def _shown(text: str) -> str:
    """On one line, and as it is written: nothing in a document becomes a table cell, a link or a picture."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split())) or "(empty)"
