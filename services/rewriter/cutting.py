"""Cuts rewrites to the suffix length in the policy's tokens, which are what the trainer trains on."""

import threading
from dataclasses import dataclass
from typing import Any

_REPLACEMENT = "�"


@dataclass(frozen=True)
class Cut:
    """`text` is what `token_ids` say; a character cut at the end is left out of it."""

    token_ids: tuple[int, ...]
    text: str
    is_whole: bool
    """Nothing was cut off."""


class PolicyTokens:
    """The policy's tokenizer, for text that continues other text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Fast tokenizers keep truncation state, which two threads must not change at once.
        self._lock = threading.Lock()
        self._anchor = self._encode(":")

    def cut(self, text: str, max_tokens: int) -> Cut:
        """The first `max_tokens` tokens of `text`."""
        with self._lock:
            token_ids = self._continuation_ids(text)
            kept = token_ids[:max_tokens]
            is_whole = len(kept) == len(token_ids)
            return Cut(tuple(kept), self._continuation_text(kept).rstrip(_REPLACEMENT), is_whole)

    def _continuation_ids(self, text: str) -> list[int]:
        """Tokenizers in SentencePiece's manner put a space before every text that they encode, and drop it again when
        they decode; after a known token neither happens."""
        plain = self._encode(text)
        if self._continuation_text(plain) == text:
            return plain
        anchored = self._encode(f":{text}")
        return anchored[len(self._anchor) :] if anchored[: len(self._anchor)] == self._anchor else plain

    def _continuation_text(self, token_ids: list[int]) -> str:
        return self._decode([*self._anchor, *token_ids]).removeprefix(self._decode(self._anchor))

    def _encode(self, text: str) -> list[int]:
        # A document may spell out a special token such as <|endoftext|>: here that is text like any other.
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
