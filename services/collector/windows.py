"""From a document to its windows: tokenize, cut, show. Called by parts.py; blocking, so from a thread.

    document --encode--> tokens --Cutter--> spans --WindowMaker--> Window --PolicyTokenizer.show--> WindowText

    document  |--------------------------- tokens ---------------------------|
    window 0  [BOS . prefix . |chunk|chunk|chunk|chunk]
    window 1                           [BOS . overlap . |chunk|chunk|tail]

The chunks of a window are contiguous. The first one starts as soon as it has a prefix of `min_prefix_tokens`, but never
before the end of what earlier windows have cut. A window that is cut for its length ends with its last chunk, and the
next one continues there. Two stretches are context only:

- the first `min_prefix_tokens` of a document, and of a window whatever lies before its first chunk,
- the last tokens of a document if they are fewer than `min_suffix_tokens`.

No cut falls inside a UTF-8 character. A chunk's end moves back, by 3 tokens at most, so a chunk may be shorter than
`suffix_tokens`, never longer; a start moves forward. Where no character begins that near (ready ids of broken bytes)
the cut stays, and the chunk is dropped as `broken_text`.

Example: 10 tokens, context_tokens 10, min_prefix_tokens 4, suffix_tokens 3, min_suffix_tokens 2, no BOS:
one window 0:10 with chunks 4:7 and 7:10.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from services.collector.sources.base import Document
from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import TextFlaw
from shared.records import DroppedChunk, WindowKey
from shared.seeds import seed_of
from shared.settings import ChunksSettings


@dataclass(frozen=True)
class Chunk:
    """The suffix `token_ids[start:end]` of a window; its prefix is all before it."""

    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Bounds its candidates: summed log-probs of unequal lengths say little about which is better."""
        return self.end - self.start


@dataclass(frozen=True)
class Window:
    """About to become a `ScoredWindow`."""

    key: WindowKey
    source_id: str
    token_ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    read_at: float
    dropped: tuple[DroppedChunk, ...] = ()
    """Chunks that can't be shown truthfully, with the reason."""


@dataclass(frozen=True)
class TextSpan:
    """A chunk's suffix in characters of its window's text: `text[start:end]`."""

    start: int
    end: int
    begins_text: bool = False
    """No text comes before it, at most a BOS."""
    ends_document: bool = False
    """Its last token is an end-of-text, which is not in the text."""


@dataclass(frozen=True)
class WindowText:
    """The text of one window, and where each chunk's suffix lies in it."""

    text: str
    spans: tuple[TextSpan, ...]
    """One per chunk of the window, in their order."""

    def suffix(self, index: int) -> str:
        return self.text[self.spans[index].start : self.spans[index].end]


class PolicyTokenizer:
    """From a folder or a Hugging Face name; SettingsError if there is none."""

    def __init__(self, source: str) -> None:
        tokenizer = load_tokenizer(source, setting="policy.tokenizer (or policy.model)")
        self.vocabulary_size = len(tokenizer)
        self._codec = codec = TokenCodec(tokenizer)
        self.begins_character, self.encode, self.decode = codec.begins_character, codec.encode, codec.decode

    @property
    def opening(self) -> tuple[int, ...]:
        """What every window begins with: the BOS of a tokenizer that puts one before every text."""
        return () if self._codec.beginning is None else (self._codec.beginning,)

    def as_document(self, token_ids: tuple[int, ...], *, end_of_text: bool) -> tuple[int, ...]:
        """Without BOS, as every window gets one; with the end-of-text at the end, if the tokenizer has one."""
        while token_ids and token_ids[:1] == self.opening:
            token_ids = token_ids[1:]
        end = self._codec.end
        if not end_of_text or end is None or not token_ids or token_ids[-1] == end:
            return token_ids
        return (*token_ids, end)

    def flaw(self, token_ids: Sequence[int], chunk: Chunk) -> TextFlaw:
        """Why text can't show all of the chunk's suffix; empty if it can."""
        if not all(map(self.begins_character, (token_ids[chunk.start], *token_ids[chunk.end : chunk.end + 1]))):
            return "broken_text"
        return self._codec.stretch(token_ids, chunk.start, chunk.end).flaw

    def show(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> WindowText:
        """Decodes the stretches between the chunks' borders one by one, each after the tokens before it."""
        cuts = sorted({0, len(token_ids), *(border for chunk in chunks for border in (chunk.start, chunk.end))})
        texts = [self._codec.stretch(token_ids, cut, end).text for cut, end in pairwise(cuts)]
        place = dict(zip(cuts, accumulate(map(len, texts), initial=0), strict=True))
        spans = tuple(
            TextSpan(
                place[chunk.start],
                place[chunk.end],
                begins_text=place[chunk.start] == 0 and not any(map(self._codec.is_text, token_ids[: chunk.start])),
                ends_document=self._codec.end is not None and token_ids[chunk.end - 1] == self._codec.end,
            )
            for chunk in chunks
        )
        return WindowText("".join(texts), spans)


MAX_MOVED_TOKENS = 3  # a UTF-8 character has at most four bytes, so one begins at most three tokens away
BeginsCharacter = Callable[[int], bool]
"""Whether a document may be cut before this one of its tokens."""


@dataclass(frozen=True)
class Span:
    """A window: `document_token_ids[begin:end]` and its chunks, in offsets of the window (BOS included)."""

    begin: int
    end: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Cutter:
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


def _back(place: int, may_cut: BeginsCharacter, *, above: int) -> int:
    nearby = range(place, max(above, place - MAX_MOVED_TOKENS - 1), -1)
    return next((found for found in nearby if may_cut(found)), place)


def _forward(place: int, may_cut: BeginsCharacter, *, limit: int) -> int:
    nearby = range(place, min(limit, place + MAX_MOVED_TOKENS) + 1)
    return next((found for found in nearby if may_cut(found)), place)


def draw_chunks(found: tuple[Chunk, ...], *, key: WindowKey, chunks_per_window: int, seed: int) -> tuple[Chunk, ...]:
    """`chunks_per_window` of them in their order (0: all), the same ones for the same key and seed."""
    if not 0 < chunks_per_window < len(found):
        return found
    drawn = random.Random(seed_of(seed, key, "chunks")).sample(range(len(found)), chunks_per_window)
    return tuple(found[index] for index in sorted(drawn))


@dataclass(frozen=True)
class WindowMaker:
    tokenizer: PolicyTokenizer
    chunks: ChunksSettings
    seed: int

    def windows(self, document: Document, *, part: int, epoch: int) -> list[Window]:
        """Empty for a document without room for one chunk."""
        read_at = time.time()
        content = document.content
        ready = tuple(self.tokenizer.encode(content)) if isinstance(content, str) else content  # may have BOS and end
        token_ids = self.tokenizer.as_document(ready, end_of_text=self.chunks.end_of_text)
        opening = self.tokenizer.opening
        spans = Cutter(self.chunks, num_opening=len(opening)).cut(
            len(token_ids), lambda token: self.tokenizer.begins_character(token_ids[token])
        )
        windows = []
        for number, span in enumerate(spans):
            key = WindowKey(part=part, epoch=epoch, position=document.position, window=number)
            of_window = (*opening, *token_ids[span.begin : span.end])
            chunks, dropped = self._choose(of_window, span, key)
            windows.append(Window(key, document.source_id, of_window, chunks, read_at, dropped))
        return windows

    def _choose(
        self, token_ids: tuple[int, ...], span: Span, key: WindowKey
    ) -> tuple[tuple[Chunk, ...], tuple[DroppedChunk, ...]]:
        """The window's drawn chunks, and those among them that have no truthful text."""
        drawn = draw_chunks(span.chunks, key=key, chunks_per_window=self.chunks.chunks_per_window, seed=self.seed)
        flaws = [(chunk, self.tokenizer.flaw(token_ids, chunk)) for chunk in drawn]
        dropped = [DroppedChunk(start=chunk.start, reason=flaw) for chunk, flaw in flaws if flaw]
        return tuple(chunk for chunk, flaw in flaws if not flaw), tuple(dropped)
