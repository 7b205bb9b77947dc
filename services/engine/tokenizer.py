"""The model's tokenizer as an engine needs it: no special tokens added, safe from several threads."""

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer

from shared.errors import EngineError

_REPLACEMENT = "\ufffd"
_LABEL_CHARACTERS = 32
"""Texts as short as a judge's labels are asked for again and again: their tokens are remembered."""


class Tokenizer:
    """Of the model's folder or name. Raises EngineError if there is none."""

    def __init__(self, source: str) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise EngineError(f"no tokenizer can be loaded from {source!r}: {exc}") from exc
        # Fast tokenizers keep truncation state, which two threads must not change at once.
        self._lock = threading.Lock()
        self._encode_label = lru_cache(maxsize=1024)(self._encode)
        self._anchor = self.encode("a")[-1:]
        self._anchor_text = self.decode(self._anchor)

    def encode(self, text: str) -> list[int]:
        return list(self._encode_label(text) if len(text) <= _LABEL_CHARACTERS else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        with self._lock:
            found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        with self._lock:
            text: str = self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        return text

    def decode_continuation(self, token_ids: Sequence[int]) -> str:
        """Text that continues other text: a leading space stays, cut characters at either end are trimmed.

        Tokenizers in SentencePiece's manner drop the first space of what they decode; a known letter before it
        keeps it.
        """
        text = self.decode([*self._anchor, *token_ids])
        text = text.removeprefix(self._anchor_text) if self._anchor_text else text
        return text.strip(_REPLACEMENT)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(self, prompt: str) -> str:
        if not self.has_chat_template:
            raise EngineError("the model's tokenizer has no chat template: set `chat = false`")
        with self._lock:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        return text
