"""Small tokenizers with the control tokens and chat templates of five model families, and an engine for each."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from services.engine.base import Generation, Prompt, Sampling, TokenScore
from services.engine.local import LocalEngine
from shared.engine_settings import EngineSettings
from tests.services.subject_tokenizers import BOS, EOS, byte_level, save_tokenizer, sentence_piece_bpe
from tests.services.subject_tokenizers import sentence_piece_unigram as unigram

_CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
_LLAMA_3 = """\
<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
_LLAMA_2 = """\
{%- if messages[0].role == "system" -%}
<s>[INST] <<SYS>>
{{ messages[0].content }}
<</SYS>>

{{ messages[1].content | trim }} [/INST]
{%- else -%}
<s>[INST] {{ messages[0].content | trim }} [/INST]
{%- endif -%}"""
_GEMMA = """\
<bos>{% for message in messages %}
{%- if message.role == "system" %}{{ raise_exception("System role not supported") }}{% endif -%}
<start_of_turn>{{ message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
_DEEPSEEK = """\
<｜begin▁of▁sentence｜>{% for message in messages %}{% if message.role == "system" %}{{ message.content }}
{%- else %}<｜User｜>{{ message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜><think>
{% endif %}"""


@dataclass(frozen=True)
class Family:
    core: Callable[[], Tokenizer]
    special: tuple[str, ...]
    added: tuple[str, ...]
    """Added tokens that are not special."""
    template: str


FAMILIES = {
    "ChatML": Family(
        lambda: byte_level(adds_bos=False),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
        _CHATML,
    ),
    "Llama 3": Family(
        lambda: byte_level(adds_bos=True),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        (),
        _LLAMA_3,
    ),
    "Llama 2": Family(sentence_piece_bpe, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"), ("[TOOL_CALLS]",), _LLAMA_2),
    "Gemma": Family(
        unigram, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), ("<unused0>", "<start_of_image>"), _GEMMA
    ),
    "DeepSeek": Family(
        lambda: byte_level(adds_bos=True),
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>"),
        _DEEPSEEK,
    ),
}
SPELLINGS = tuple(
    dict.fromkeys([BOS, EOS, *(token for family in FAMILIES.values() for token in (*family.special, *family.added))])
)
"""All control and added tokens of the five families."""


def save_family(name: str, folder: Path) -> Path:
    family = FAMILIES[name]
    core = family.core()
    core.add_special_tokens([AddedToken(token, special=True) for token in family.special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    tokenizer = save_tokenizer(core, folder, additional_special_tokens=list(family.special))
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    return folder


class TokenizerEngine(LocalEngine):
    """A model's tokenizer and chat template without the model."""

    weight_version = 0
    can_constrain = False

    def __init__(self, folder: Path, **options: Any) -> None:
        """`options` are engine settings."""
        super().__init__(EngineSettings(model=str(folder), **options), name=f"tokenizer:{folder.name}")

    async def start(self) -> None:
        await self._load_tokenizer()

    async def close(self) -> None: ...
    async def load_weights(self, folder: Path, version: int) -> None: ...

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        raise NotImplementedError

    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = ""
    ) -> tuple[list[list[TokenScore]], int]:
        raise NotImplementedError

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Of all added tokens but the unknown one."""
        return frozenset(self._chat.added_tokens_decoder) - {self._chat.unk_token_id}

    def letters(self, token_ids: Sequence[int]) -> str:
        """All that they say, control tokens included."""
        return str(self._chat.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def started(folder: Path, **options: Any) -> TokenizerEngine:
    engine = TokenizerEngine(folder, **options)
    asyncio.run(engine.start())
    return engine
