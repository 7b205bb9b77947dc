"""Keeps the chunks and candidates of a share of all windows in the database, for people to read. From storage.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from services.collector.seeds import share_of
from services.collector.texts import PolicyTokenizer
from shared.database import CandidateRow, ChunkRow, transaction
from shared.leases import Lease
from shared.ledger import Ledger, storable
from shared.records import ScoredChunk, ScoredDocument

_PREFIX_CHARACTERS = 500
_PREFIX_TOKENS = 500
"""Enough for the characters above: a token has at least one byte, and most have several characters."""


@dataclass(frozen=True)
class Recorder:
    """Writes the rows of drawn windows; the draw depends on the document id only. Blocking."""

    ledger: Ledger
    tokenizer: PolicyTokenizer
    share: float

    def record(self, document: ScoredDocument, lease: Lease) -> None:
        """Replaces the rows of an earlier, unfinished try. Raises FencedError as the ledger does."""
        if share_of(document.key, "record") >= self.share:
            return
        prefixes = [self._end_of_prefix(document.token_ids, chunk.start) for chunk in document.chunks]
        with transaction(self.ledger.engine) as session:
            self.ledger.refuse_if_fenced(session, lease)
            old = sa.select(ChunkRow.id).where(
                ChunkRow.run_id == document.run_id, ChunkRow.document_id == document.document_id
            )
            session.execute(sa.delete(CandidateRow).where(CandidateRow.chunk_id.in_(old)))
            session.execute(sa.delete(ChunkRow).where(ChunkRow.id.in_(old)))
            for chunk, prefix in zip(document.chunks, prefixes, strict=True):
                row = _chunk_row(document, chunk, prefix)
                session.add(row)
                session.flush()
                session.add_all(_candidate_rows(chunk, row.id))
            session.add_all(_dropped_row(document, lost.start, lost.reason) for lost in document.dropped_chunks)

    def _end_of_prefix(self, token_ids: Sequence[int], start: int) -> str:
        return self.tokenizer.decode(token_ids[max(0, start - _PREFIX_TOKENS) : start])[-_PREFIX_CHARACTERS:]


def _chunk_row(document: ScoredDocument, chunk: ScoredChunk, prefix: str) -> ChunkRow:
    judgement = chunk.judgement
    return ChunkRow(
        run_id=document.run_id,
        document_id=document.document_id,
        start=chunk.start,
        prefix=storable(prefix),
        fingerprint=judgement.fingerprint if judgement else "",
        reasoning=storable(judgement.reasoning) if judgement else "",
        num_calls=judgement.num_calls if judgement else 0,
        num_failures=judgement.num_failures if judgement else 0,
        scored_at=document.scored_at,
    )


def _dropped_row(document: ScoredDocument, start: int, reason: str) -> ChunkRow:
    return ChunkRow(
        run_id=document.run_id,
        document_id=document.document_id,
        start=start,
        prefix="",
        dropped_reason=storable(reason),
        scored_at=document.scored_at,
    )


def _candidate_rows(chunk: ScoredChunk, chunk_id: int) -> list[CandidateRow]:
    judgement = chunk.judgement
    return [
        CandidateRow(
            chunk_id=chunk_id,
            kinds=",".join(candidate.kinds),
            text=storable(candidate.text),
            num_tokens=len(candidate.token_ids),
            policy_version=candidate.policy_version,
            reward=judgement.rewards[index] if judgement else None,
            scores={name: scores[index] for name, scores in judgement.scores.items()} if judgement else {},
        )
        for index, candidate in enumerate(chunk.candidates)
    ]
