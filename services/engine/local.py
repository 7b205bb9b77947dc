"""What engines with a model on this machine share: text becomes tokens here, and is checked before the model sees it.

Base of vllm.py and transformers.py.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from services.engine.base import Generation, Prompt, TokenScore, TokenSequence
from services.engine.tokenizer import ChatTokenizer
from services.engine.trunks import Tokens
from shared.errors import EngineError, PromptError


class LocalEngine(ABC):
    """The part of `Engine` and `TokenScorer` that is a matter of the tokenizer."""

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
        """EngineError before the model is loaded, as of the others."""

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
    def _tokens(self) -> ChatTokenizer:
        if self._tokenizer is None:
            raise self._starting()
        return self._tokenizer

    def _generation(
        self, prompt: Tokens, token_ids: Tokens, finish_reason: Literal["length", "stop"], version: int
    ) -> Generation:
        """A sample with its text."""
        shown = self._tokens.continuation(prompt, token_ids, ends=self._eos_token_ids)
        return Generation(token_ids, shown.text, finish_reason, version, shown.flaw)

    def _starting(self) -> EngineError:
        return EngineError(f"{self.name} is still starting: try again")

    def _encode(self, prompt: Prompt) -> Tokens:
        """Its tokens, none of them outside the vocabulary (PromptError). May be empty."""
        token_ids = tuple(self._tokens.encode(prompt) if isinstance(prompt, str) else prompt)
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
            found = f"{min(token_ids)}..{max(token_ids)}"
            raise PromptError(f"token ids must lie in 0..{self._vocab_size - 1}, got {found}")
        return token_ids

    def _encode_scored(self, continuations: Sequence[Prompt]) -> list[Tokens]:
        """What is to be scored: at least one token each."""
        encoded = [self._encode(continuation) for continuation in continuations]
        if not all(encoded):
            raise PromptError(f"continuation {encoded.index(())} is empty: there is no token to score")
        return encoded

    def _prepare(self, prompt: Prompt, *, room: int) -> Tokens:
        """The prompt's tokens, if there are any and `room` more fit into the model; PromptError otherwise."""
        token_ids = self._encode(prompt)
        if not token_ids:
            raise PromptError("the prompt is empty: the model needs at least one token to continue")
        if len(token_ids) + room > self._max_tokens:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens and needs room for {room} more, "
                f"but {self.name} takes {self._max_tokens} in all"
            )
        return token_ids
