"""The tokenizer of a model in this process: transformers', because prompts need its chat template."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer

from services.tokenizer import Shown, TokenCodec, from_transformers
from shared.errors import EngineError

_LABEL_CHARACTERS = 32
"""Texts as short as a judge's labels are encoded again and again: their tokens are remembered."""


class ChatTokenizer:
    """From a folder or a Hugging Face name; EngineError if there is none. Safe from several threads."""

    def __init__(self, source: str) -> None:
        try:
            self._found: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise EngineError(f"no tokenizer can be loaded from {source!r}: {exc}") from exc
        self._tokenizer = from_transformers(self._found)
        self._encode_label = lru_cache(maxsize=1024)(self._encode)
        self._codec = TokenCodec(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """No special tokens added; those in the text, such as a chat template's, are encoded as such."""
        return list(self._encode_label(text) if len(text) <= _LABEL_CHARACTERS else self._encode(text))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, splits_special=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skips_special=True)

    def continuation(self, prompt: Sequence[int], token_ids: Sequence[int], *, ends: Collection[int]) -> Shown:
        """What sampled tokens say after their prompt; `ends`: the model's end-of-sequence tokens."""
        return self._codec.continuation(prompt, token_ids, ends=ends)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._found.chat_template)

    def render_chat(self, prompt: str) -> str:
        if not self.has_chat_template:
            raise EngineError("the model's tokenizer has no chat template: set `chat = false`")
        text: str = self._found.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        return text
