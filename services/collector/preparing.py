"""From a document to the windows that will be worked on. Called by parts.py, in the tokenizer thread."""

import time
from dataclasses import dataclass

from services.collector.sources.base import Document
from services.collector.texts import PolicyTokenizer
from services.collector.windows import Chunk, cut_windows, draw_chunks
from shared.records import DocumentKey
from shared.settings import ChunksSettings


@dataclass(frozen=True)
class Window:
    """One window of a document, about to become a `ScoredDocument`."""

    key: DocumentKey
    source_id: str
    token_ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    read_at: float


@dataclass(frozen=True)
class Preparer:
    """Tokenises and cuts."""

    tokenizer: PolicyTokenizer
    chunks: ChunksSettings
    seed: int

    def windows(self, document: Document, *, part: int, epoch: int) -> list[Window]:
        """Empty for a document without room for one chunk."""
        content, read_at = document.content, time.time()
        token_ids = tuple(self.tokenizer.encode(content)) if isinstance(content, str) else content
        windows = []
        for number, span in enumerate(cut_windows(len(token_ids), self.chunks)):
            key = DocumentKey(part=part, epoch=epoch, position=document.position, window=number)
            drawn = draw_chunks(
                span.chunks, key=key, chunks_per_document=self.chunks.chunks_per_document, seed=self.seed
            )
            windows.append(Window(key, document.source_id, token_ids[span.begin : span.end], drawn, read_at))
        return windows
