"""Cuts a document's tokens into windows and their chunks. Pure. Called by preparing.py.

    document  |--------------------------- tokens ---------------------------|
    window 0  [BOS . prefix . |chunk|chunk|chunk|chunk]
    window 1                           [BOS . overlap . |chunk|chunk|tail]

Chunks follow each other without a gap from the first one of a window to its last one. The first one starts where there
is a prefix of `min_prefix_tokens`, and behind what windows before have cut: at the end of the overlap. A window that
ends for its length ends with its last chunk, so that the next one goes on right there. Context only, in no chunk:

- the first `min_prefix_tokens` of a document, and those of a window that are more than the overlap,
- a document's last tokens, if they are fewer than `min_suffix_tokens`. A window without any chunk is none.

Nothing is cut inside a character. A chunk's end moves back to where one begins, which takes at most 3 tokens, so a
chunk may be shorter than `suffix_tokens`, never longer; a first start moves forward. Where no character begins so near
(ready ids of broken bytes) the cut stays where it is, and such a chunk is refused by preparing.py.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from services.collector.seeds import seed_of
from shared.records import DocumentKey
from shared.settings import ChunksSettings

MAX_MOVED_TOKENS = 3
"""A UTF-8 character has at most four bytes, so one begins at most three tokens away."""

BeginsCharacter = Callable[[int], bool]
"""Whether a document may be cut before this one of its tokens."""


@dataclass(frozen=True)
class Chunk:
    """The suffix `token_ids[start:end]` of a window; its prefix is all before it."""

    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """What bounds its candidates: summed log-probs of unequal lengths say little about which is better."""
        return self.end - self.start


@dataclass(frozen=True)
class Span:
    """A window: `document_token_ids[begin:end]` and its chunks, in offsets of the window (BOS included)."""

    begin: int
    end: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Cutter:
    """Cuts documents of one tokenizer."""

    chunks: ChunksSettings
    num_opening: int = 0
    """Tokens that are put before every window (a BOS). They count in its length and in its first prefix."""

    def cut(self, num_tokens: int, begins_character: BeginsCharacter = lambda token: True) -> list[Span]:
        """All windows of a document that have a chunk; none for a document that is too short."""

        def may_cut(place: int) -> bool:
            return place == num_tokens or begins_character(place)

        spans: list[Span] = []
        begin = done = 0
        while begin < num_tokens:
            end = min(begin + self.chunks.context_tokens - self.num_opening, num_tokens)
            end = end if end == num_tokens else _back(end, may_cut, above=begin)
            found = self._cut_chunks(begin, end, done, may_cut)
            done = found[-1][1] if found and end < num_tokens else end
            if found:
                spans.append(self._span(begin, done, found))
            if end == num_tokens:
                break
            begin = _forward(max(begin + 1, done - self.chunks.window_overlap_tokens), may_cut, limit=done)
        return spans

    def _cut_chunks(self, begin: int, end: int, done: int, may_cut: BeginsCharacter) -> list[tuple[int, int]]:
        """In offsets of the document, for the window `begin:end`, of which all before `done` was cut before."""
        prefix = max(0, self.chunks.min_prefix_tokens - self.num_opening)
        start = _forward(max(begin + prefix, done), may_cut, limit=end)
        found = []
        while end - start >= self.chunks.min_suffix_tokens:
            stop = start + self.chunks.suffix_tokens
            stop = end if stop >= end else _back(stop, may_cut, above=start)
            found.append((start, stop))
            start = stop
        return found

    def _span(self, begin: int, end: int, found: list[tuple[int, int]]) -> Span:
        moved = self.num_opening - begin
        return Span(begin, end, tuple(Chunk(start + moved, stop + moved) for start, stop in found))


def draw_chunks(
    found: tuple[Chunk, ...], *, key: DocumentKey, chunks_per_document: int, seed: int
) -> tuple[Chunk, ...]:
    """`chunks_per_document` of them in their order (0: all), the same ones for the same key and seed."""
    if not 0 < chunks_per_document < len(found):
        return found
    drawn = random.Random(seed_of(seed, key, "chunks")).sample(range(len(found)), chunks_per_document)
    return tuple(found[index] for index in sorted(drawn))


def _back(place: int, may_cut: BeginsCharacter, *, above: int) -> int:
    nearby = range(place, max(above, place - MAX_MOVED_TOKENS - 1), -1)
    return next((found for found in nearby if may_cut(found)), place)


def _forward(place: int, may_cut: BeginsCharacter, *, limit: int) -> int:
    nearby = range(place, min(limit, place + MAX_MOVED_TOKENS) + 1)
    return next((found for found in nearby if may_cut(found)), place)
