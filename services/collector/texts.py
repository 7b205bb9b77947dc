"""The policy's tokenizer in the collector: documents become ids, and ids the text that teacher and judge are shown.

Blocks: call it from threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from services.collector.windows import Chunk
from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import TextFlaw


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

    def prefix(self, index: int) -> str:
        """All text before chunk `index`'s suffix."""
        return self.text[: self.spans[index].start]

    def suffix(self, index: int) -> str:
        return self.text[self.spans[index].start : self.spans[index].end]


class PolicyTokenizer:
    """From a folder or a Hugging Face name; SettingsError if there is none."""

    def __init__(self, source: str) -> None:
        tokenizer = load_tokenizer(source, setting="policy.tokenizer (or policy.model)")
        self.vocabulary_size = len(tokenizer)
        self._codec = TokenCodec(tokenizer)
        self.begins_character = self._codec.begins_character
        self.encode = self._codec.encode
        self.decode = self._codec.decode

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
        if not self.begins_character(token_ids[chunk.start]):
            return "broken_text"
        if chunk.end < len(token_ids) and not self.begins_character(token_ids[chunk.end]):
            return "broken_text"
        return self._codec.stretch(token_ids, chunk.start, chunk.end).flaw

    def show(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> WindowText:
        """Prefix + suffix of each chunk is the text of the raw window.

        The stretches between the chunks' borders are decoded one by one, each after the tokens before it.
        """
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
