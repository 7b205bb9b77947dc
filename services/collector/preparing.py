"""From a document to the windows that will be worked on. Called by parts.py, in the tokenizer thread."""

import time
from dataclasses import dataclass

from services.collector.sources.base import Document
from services.collector.texts import PolicyTokenizer
from services.collector.windows import Chunk, Cutter, Span, draw_chunks
from shared.records import DocumentKey, DroppedChunk
from shared.settings import ChunksSettings


@dataclass(frozen=True)
class Window:
    """One window of a document, about to become a `ScoredDocument`."""

    key: DocumentKey
    source_id: str
    token_ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    read_at: float
    dropped: tuple[DroppedChunk, ...] = ()
    """Chunks that can't be shown truthfully, with the reason."""


@dataclass(frozen=True)
class Preparer:
    """Tokenises and cuts."""

    tokenizer: PolicyTokenizer
    chunks: ChunksSettings
    seed: int

    def windows(self, document: Document, *, part: int, epoch: int) -> list[Window]:
        """Empty for a document without room for one chunk."""
        read_at = time.time()
        token_ids = self._token_ids(document)
        opening = self.tokenizer.opening
        spans = Cutter(self.chunks, num_opening=len(opening)).cut(
            len(token_ids), lambda token: self.tokenizer.begins_character(token_ids[token])
        )
        windows = []
        for number, span in enumerate(spans):
            key = DocumentKey(part=part, epoch=epoch, position=document.position, window=number)
            of_window = (*opening, *token_ids[span.begin : span.end])
            chunks, dropped = self._choose(of_window, span, key)
            windows.append(Window(key, document.source_id, of_window, chunks, read_at, dropped))
        return windows

    def _token_ids(self, document: Document) -> tuple[int, ...]:
        """Without BOS, and with end-of-text where that is set. Ready ids may have both already."""
        content = document.content
        token_ids = tuple(self.tokenizer.encode(content)) if isinstance(content, str) else content
        return self.tokenizer.as_document(token_ids, end_of_text=self.chunks.end_of_text)

    def _choose(
        self, token_ids: tuple[int, ...], span: Span, key: DocumentKey
    ) -> tuple[tuple[Chunk, ...], tuple[DroppedChunk, ...]]:
        """The window's drawn chunks, and those among them that have no truthful text."""
        drawn = draw_chunks(span.chunks, key=key, chunks_per_document=self.chunks.chunks_per_document, seed=self.seed)
        flaws = [(chunk, self.tokenizer.flaw(token_ids, chunk)) for chunk in drawn]
        dropped = [DroppedChunk(start=chunk.start, reason=flaw) for chunk, flaw in flaws if flaw]
        return tuple(chunk for chunk, flaw in flaws if not flaw), tuple(dropped)
