"""The model's tokenizer as an engine needs it: no special tokens added, safe from several threads."""

import threading
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer

from services.tokenizer import Shown, TokenCodec
from shared.errors import EngineError

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
        self._codec = TokenCodec(self._tokenizer)

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

    def continuation(self, prompt: Sequence[int], token_ids: Sequence[int], *, ends: Collection[int]) -> Shown:
        """What sampled tokens say after their prompt; `ends`: the model's end-of-sequence tokens."""
        return self._codec.continuation(prompt, token_ids, ends=ends)

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
