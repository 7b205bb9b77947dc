"""Cuts a document's tokens into windows and their chunks. Pure. Called by preparing.py.

    document  |--------------------------- tokens ---------------------------|
    window 0  [BOS . prefix . |chunk|chunk|chunk|chunk]
    window 1                               [overlap . |chunk|chunk|tail]

Chunks start at multiples of `suffix_tokens` from the window's start; where `min_prefix_tokens` is less than that, the
first one starts right after it and the others follow. A chunk that begins in the overlap was a chunk
of the window before; one with too short a prefix, or too short itself, is context only. A window without any chunk
is none.
"""

import random
from dataclasses import dataclass

from services.collector.seeds import seed_of
from shared.records import DocumentKey
from shared.settings import ChunksSettings


@dataclass(frozen=True)
class Chunk:
    """The suffix `token_ids[start:end]` of a window; its prefix is all before it."""

    start: int
    end: int


@dataclass(frozen=True)
class Span:
    """A window: `document_token_ids[begin:end]` and its chunks, in offsets of the window."""

    begin: int
    end: int
    chunks: tuple[Chunk, ...]


def cut_windows(num_tokens: int, chunks: ChunksSettings) -> list[Span]:
    """All windows of a document that have a chunk; none for a document that is too short."""
    spans = []
    step = chunks.context_tokens - chunks.window_overlap_tokens
    for begin in range(0, num_tokens, step):
        overlap = chunks.window_overlap_tokens if begin else 0
        end = min(begin + chunks.context_tokens, num_tokens)
        if found := _cut_chunks(end - begin, overlap, chunks):
            spans.append(Span(begin, end, found))
        if end == num_tokens:
            break
    return spans


def draw_chunks(
    found: tuple[Chunk, ...], *, key: DocumentKey, chunks_per_document: int, seed: int
) -> tuple[Chunk, ...]:
    """`chunks_per_document` of them in their order (0: all), the same ones for the same key and seed."""
    if not 0 < chunks_per_document < len(found):
        return found
    drawn = random.Random(seed_of(seed, key, "chunks")).sample(range(len(found)), chunks_per_document)
    return tuple(found[index] for index in sorted(drawn))


def _cut_chunks(length: int, overlap: int, chunks: ChunksSettings) -> tuple[Chunk, ...]:
    origin = min(chunks.min_prefix_tokens, chunks.suffix_tokens)
    first = max(chunks.min_prefix_tokens, overlap) - origin
    starts = range(origin + -(-first // chunks.suffix_tokens) * chunks.suffix_tokens, length, chunks.suffix_tokens)
    cut = (Chunk(start, min(start + chunks.suffix_tokens, length)) for start in starts)
    return tuple(chunk for chunk in cut if chunk.end - chunk.start >= chunks.min_suffix_tokens)
