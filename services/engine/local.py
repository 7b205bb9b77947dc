"""The base of engines whose model runs on this machine: it turns text into tokens and validates them."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import AutoTokenizer

from services.engine.base import Generation, Prompt, Tokens, TokenScore, TokenSequence, WordOdds
from services.engine.words import WordTokens
from services.tokenizer import TokenCodec, from_transformers
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, PromptError

_LABEL_CHARACTERS = 32
"""Texts as short as a judge's labels are encoded again and again: their tokens are remembered."""


@dataclass(frozen=True)
class LocalModel:
    module: Any
    """A transformers causal language model; on the meta device if its weights are in another process."""
    vocab_size: int
    max_tokens: int
    """Longest prompt plus answer."""
    eos_token_ids: frozenset[int]


class LocalEngine(ABC):
    """The part of `Engine` and `TokenScorer` that needs only the tokenizer. Encodes and decodes on any thread."""

    can_score = can_grade = has_tokenizer = True

    def __init__(self, settings: EngineSettings, *, name: str, tokenizer: str = "") -> None:
        """`tokenizer`: folder or name, if not the model's."""
        self.name = name
        self._settings = settings
        self._tokenizer_source = tokenizer or settings.model
        self._chat: Any = None
        self._codec: TokenCodec | None = None
        self._model: LocalModel | None = None
        """Set by `start`, as the two above."""
        self._encode_short = lru_cache(maxsize=1024)(self._encode_text)
        self._encode_label = lru_cache(maxsize=1024)(self._encode_continuation)
        self._word_tokens = lru_cache(maxsize=64)(lambda words: WordTokens(self._tokens, words))

    @abstractmethod
    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = ""
    ) -> tuple[list[list[TokenScore]], int]: ...

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        scores, _ = await self.score_tokens(prompt, continuations, adapter=adapter)
        return [[token.log_prob for token in of_continuation] for of_continuation in scores]

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text, such as a chat template's, are encoded as such."""
        return list(self._encode_short(text) if len(text) <= _LABEL_CHARACTERS else self._encode_text(text))

    def _encode_text(self, text: str) -> list[int]:
        return self._tokens.tokenizer.encode(text, splits_special=False)

    def _encode_continuation(self, text: str) -> list[int]:
        return self._tokens.encode_continuation(text)

    def encode_content(self, text: str) -> list[int]:
        return self._tokens.encode_content(text)

    def decode(self, token_ids: TokenSequence) -> str:
        return self._tokens.tokenizer.decode(token_ids, skips_special=True)

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None and bool(self._chat.chat_template)

    def render_chat(self, prompt: str) -> str:
        _ = self._tokens
        if not self.has_chat_template:
            raise EngineError("the model's tokenizer has no chat template: set `chat = false`")
        system = self._settings.system_prompt
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        options = self._settings.chat_template_arguments | {"tokenize": False, "add_generation_prompt": True}
        try:
            return str(self._chat.apply_chat_template(messages, **options))
        except (TemplateError, TypeError, ValueError) as exc:
            raise EngineError(
                f"{self.name}: the chat template can't show a prompt: {exc}; see engine.system_prompt and "
                "engine.chat_template_arguments, or set `chat = false`"
            ) from exc

    async def _load_tokenizer(self) -> None:
        try:
            self._chat = await asyncio.to_thread(AutoTokenizer.from_pretrained, self._tokenizer_source)
        except (OSError, ValueError, KeyError, RuntimeError) as exc:
            raise EngineError(f"no tokenizer can be loaded from {self._tokenizer_source!r}: {exc}") from exc
        self._codec = await asyncio.to_thread(lambda: TokenCodec(from_transformers(self._chat)))

    @property
    def _tokens(self) -> TokenCodec:
        if self._codec is None:
            raise self._starting()
        return self._codec

    @property
    def _started(self) -> LocalModel:
        if self._model is None:
            raise self._starting()
        return self._model

    def _generation(
        self,
        prompt: Tokens,
        token_ids: Tokens,
        finish_reason: Literal["length", "stop"],
        version: int,
        *,
        words: tuple[str, ...] = (),
        log_probs: Mapping[int, Mapping[int, float]] | None = None,
    ) -> Generation:
        """`log_probs` as in `WordTokens.odds`."""
        shown = self._tokens.continuation(prompt, token_ids, ends=self._started.eos_token_ids)
        odds: tuple[WordOdds, ...] = ()
        if log_probs:
            odds = self._word_tokens(words).odds(prompt, token_ids, text=shown.text, log_probs=log_probs)
        return Generation(token_ids, shown.text, finish_reason, version, shown.flaw, odds)

    def _watched(self, words: tuple[str, ...]) -> Tokens:
        """The tokens with which one of the words may begin."""
        return self._word_tokens(words).token_ids if words else ()

    def _starting(self) -> EngineError:
        return EngineError(f"{self.name} is still starting: try again")

    def _encode(self, prompt: Prompt) -> Tokens:
        """Possibly empty. PromptError if a token is outside the vocabulary."""
        token_ids = tuple(self.encode(prompt) if isinstance(prompt, str) else prompt)
        last = self._started.vocab_size - 1
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) <= last:
            raise PromptError(f"token ids must lie in 0..{last}, got {min(token_ids)}..{max(token_ids)}")
        return token_ids

    def _encode_scored(self, continuations: Sequence[Prompt]) -> list[Tokens]:
        """At least one token each, as they continue a text; PromptError otherwise."""
        encoded = [self._encode(self._continuing(given)) for given in continuations]
        if not all(encoded):
            raise PromptError(f"continuation {encoded.index(())} is empty: there is no token to score")
        return encoded

    def _continuing(self, given: Prompt) -> TokenSequence:
        if not isinstance(given, str):
            return given
        return self._encode_label(given) if len(given) <= _LABEL_CHARACTERS else self._encode_continuation(given)

    def _prepare(self, prompt: Prompt, *, room: int) -> Tokens:
        """The prompt's tokens. PromptError if there are none, or if `room` more do not fit into the model."""
        token_ids = self._encode(prompt)
        if not token_ids:
            raise PromptError("the prompt is empty: the model needs at least one token to continue")
        if len(token_ids) + room > self._started.max_tokens:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens and needs room for {room} more, "
                f"but {self.name} takes {self._started.max_tokens} in all"
            )
        return token_ids


def end_token_ids(*configs: Any) -> frozenset[int]:
    """The end-of-sequence tokens of the first model or generation configuration that names any."""
    for config in configs:
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
