"""The base of engines whose model runs on this machine: it turns text into tokens and validates them."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Literal

from transformers import AutoTokenizer

from services.engine.base import Generation, Prompt, Tokens, TokenScore, TokenSequence
from services.tokenizer import Shown, TokenCodec, from_transformers
from shared.errors import EngineError, PromptError

_LABEL_CHARACTERS = 32
"""Texts as short as a judge's labels are encoded again and again: their tokens are remembered."""


class LocalEngine(ABC):
    """The part of `Engine` and `TokenScorer` that needs only the tokenizer."""

    def __init__(self, *, tokenizer: str) -> None:
        """`tokenizer`: folder or name."""
        self._tokenizer_source = tokenizer
        self._tokenizer: ChatTokenizer | None = None

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def _vocab_size(self) -> int:
        """EngineError before the model is loaded; the same goes for the two below."""

    @property
    @abstractmethod
    def _max_tokens(self) -> int:
        """Longest prompt plus answer."""

    @property
    @abstractmethod
    def _eos_token_ids(self) -> frozenset[int]: ...

    @abstractmethod
    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt]
    ) -> tuple[list[list[TokenScore]], int]: ...

    @property
    def can_score(self) -> bool:
        return True

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
        scores, _ = await self.score_tokens(prompt, continuations)
        return [[token.log_prob for token in of_continuation] for of_continuation in scores]

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text)

    def decode(self, token_ids: TokenSequence) -> str:
        return self._tokens.decode(token_ids)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer is not None and self._tokenizer.has_chat_template

    def render_chat(self, prompt: str) -> str:
        return self._tokens.render_chat(prompt)

    async def _load_tokenizer(self) -> None:
        self._tokenizer = await asyncio.to_thread(ChatTokenizer, self._tokenizer_source)

    @property
    def _tokens(self) -> "ChatTokenizer":
        if self._tokenizer is None:
            raise self._starting()
        return self._tokenizer

    def _generation(
        self, prompt: Tokens, token_ids: Tokens, finish_reason: Literal["length", "stop"], version: int
    ) -> Generation:
        shown = self._tokens.continuation(prompt, token_ids, ends=self._eos_token_ids)
        return Generation(token_ids, shown.text, finish_reason, version, shown.flaw)

    def _starting(self) -> EngineError:
        return EngineError(f"{self.name} is still starting: try again")

    def _encode(self, prompt: Prompt) -> Tokens:
        """Possibly empty. PromptError if a token is outside the vocabulary."""
        token_ids = tuple(self._tokens.encode(prompt) if isinstance(prompt, str) else prompt)
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            found = f"{min(token_ids)}..{max(token_ids)}"
            raise PromptError(f"token ids must lie in 0..{self._vocab_size - 1}, got {found}")
        return token_ids

    def _encode_scored(self, continuations: Sequence[Prompt]) -> list[Tokens]:
        """At least one token each; PromptError otherwise."""
        encoded = [self._encode(continuation) for continuation in continuations]
        if not all(encoded):
            raise PromptError(f"continuation {encoded.index(())} is empty: there is no token to score")
        return encoded

    def _prepare(self, prompt: Prompt, *, room: int) -> Tokens:
        """The prompt's tokens. PromptError if there are none, or if `room` more do not fit into the model."""
        token_ids = self._encode(prompt)
        if not token_ids:
            raise PromptError("the prompt is empty: the model needs at least one token to continue")
        if len(token_ids) + room > self._max_tokens:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens and needs room for {room} more, "
                f"but {self.name} takes {self._max_tokens} in all"
            )
        return token_ids


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


def end_token_ids(*configs: Any) -> frozenset[int]:
    """The end-of-sequence tokens of the first model or generation configuration that names any."""
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
