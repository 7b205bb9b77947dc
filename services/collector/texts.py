"""The policy's tokenizer as the collector needs it: documents to ids, and ids to the text that others are shown.

Blocking: called from threads. A lock keeps them apart, since tokenizers keep state.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.collector.windows import Chunk
from services.policy_tokenizer import beginning_of_text, load_tokenizer

_MAX_CUT_CHARACTERS = 4
"""A cut UTF-8 character shows as at most three replacement characters."""


@dataclass(frozen=True)
class TextSpan:
    """A chunk's suffix in characters of its window's text: `text[start:end]`."""

    start: int
    end: int


@dataclass(frozen=True)
class WindowText:
    """What teacher and judge read of one window: its text once, and where each chunk's suffix lies in it."""

    text: str
    spans: tuple[TextSpan, ...]
    """One per chunk of the window, in their order."""

    def prefix(self, index: int) -> str:
        """All text before chunk `index`'s suffix."""
        return self.text[: self.spans[index].start]

    def suffix(self, index: int) -> str:
        return self.text[self.spans[index].start : self.spans[index].end]


class PolicyTokenizer:
    """Loads from a Hugging Face folder or name. SettingsError if there is none."""

    def __init__(self, source: str) -> None:
        self._tokenizer: Any = load_tokenizer(source, setting="policy.tokenizer (or policy.model)")
        self._lock = threading.Lock()
        self._beginning = beginning_of_text(self._tokenizer)

    @property
    def vocabulary_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a document, BOS first where the tokenizer puts one. `</s>` written in a text stays text."""
        with self._lock:
            ids: list[int] = self._tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        return ids if self._beginning is None else [self._beginning, *ids]

    def show(self, token_ids: Sequence[int], chunks: Sequence[Chunk]) -> WindowText:
        """The text of one window and of its chunks, so that prefix + suffix reads as the raw window does."""
        borders = sorted({border for chunk in chunks for border in (chunk.start, chunk.end)})
        # Each border is decoded from the window's start: tokenizers drop or add spaces where a text begins.
        *decoded, whole = self._decode([*(list(token_ids[:border]) for border in borders), list(token_ids)])
        at = {border: _uncut(text, whole) for border, text in zip(borders, decoded, strict=True)}
        return WindowText(whole, tuple(_span(at[chunk.start], at[chunk.end]) for chunk in chunks))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode([list(token_ids)])[0]

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        with self._lock:
            texts: list[str] = self._tokenizer.batch_decode(
                sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return texts


@dataclass(frozen=True)
class _Border:
    """Where a token border lies in the window's text."""

    length: int
    """Whole characters before it."""
    cuts: bool
    """It lies inside the next character."""


def _uncut(text: str, whole: str) -> _Border:
    """The whole characters of a decoded beginning. A U+FFFD that the document really holds is kept."""
    for cut in range(_MAX_CUT_CHARACTERS):
        if whole.startswith(text[: len(text) - cut]):
            return _Border(max(0, len(text) - cut), cuts=cut > 0)
    return _Border(len(text.rstrip("\ufffd")), cuts=text.endswith("\ufffd"))


def _span(start: _Border, end: _Border) -> TextSpan:
    first = start.length + start.cuts
    return TextSpan(first, max(first, end.length))
