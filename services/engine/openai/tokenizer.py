"""The tokenizer and the chat template of the model behind an endpoint (`engine.tokenizer`).

With them prompts are rendered and encoded here and sent as token ids, so that nothing which a document spells can
become a control token at the other end. Only then is transformers imported: it alone renders chat templates.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from services.engine.base import Prompt, TokenSequence
from services.engine.openai.endpoint import messages_of
from services.tokenizer import TokenCodec, from_transformers
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, RequestError, SettingsError


@dataclass(frozen=True)
class EndpointTokenizer:
    """Safe from several threads."""

    codec: TokenCodec
    chat: Any
    """A `PreTrainedTokenizerBase`; only its chat template is used."""
    system_prompt: str = ""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def has_chat_template(self) -> bool:
        return bool(self.chat.chat_template)

    def encode(self, text: str) -> list[int]:
        """Special tokens in the text, such as a chat template's, are encoded as such."""
        return self.codec.tokenizer.encode(text, splits_special=False)

    def encode_content(self, text: str) -> list[int]:
        return self.codec.encode_content(text)

    def decode(self, token_ids: TokenSequence) -> str:
        return self.codec.tokenizer.decode(token_ids, skips_special=True)

    def render(self, text: str) -> str:
        """One user message in the model's chat template, with its system prompt."""
        if not self.has_chat_template:
            raise EngineError("engine.tokenizer has no chat template: set `chat = false`")
        messages = messages_of(text, system_prompt=self.system_prompt)
        options = {"tokenize": False, "add_generation_prompt": True, **self.template_arguments}
        return str(self.chat.apply_chat_template(messages, **options))

    def ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else list(prompt)


async def load_endpoint_tokenizer(settings: EngineSettings) -> EndpointTokenizer:
    """SettingsError if there is none."""
    return await asyncio.to_thread(_load, settings)


def _load(settings: EngineSettings) -> EndpointTokenizer:
    from transformers import AutoTokenizer

    source = settings.tokenizer
    try:
        found = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise SettingsError(f"engine.tokenizer = {source!r} has no tokenizer that can be loaded: {exc}") from exc
    codec = TokenCodec(from_transformers(found))
    return EndpointTokenizer(codec, found, settings.system_prompt, settings.chat_template_arguments)


def joined(prompt: Prompt, continuation: Prompt) -> Prompt:
    """Both as text or both as token ids."""
    if isinstance(prompt, str) and isinstance(continuation, str):
        return prompt + continuation
    if isinstance(prompt, str) or isinstance(continuation, str):
        raise RequestError("prompt and continuation must both be text or both token ids")
    return [*prompt, *continuation]
