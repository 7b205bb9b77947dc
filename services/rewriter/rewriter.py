"""Asks the teacher about each chunk and reads its answers: prompt -> answer -> rewrite in the policy's tokens."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.engine.base import Engine, Generation, Sampling
from services.frames import nonce_of
from services.prompts import NONCE, Prompt, opened
from services.rewriter.bridge import continued, joined_like, last_words, looked_at, without_bridge
from services.tokenizer import TokenCodec
from shared import metrics
from shared.api import Rewrite, RewriteItem, RewriteRequest, RewriteResponse, TextFlaw
from shared.engine_settings import RewriterSettings
from shared.errors import SettingsError

PROMPT = Path(__file__).parent / "prompts" / "rewrite.txt"


def load_prompt(path: Path | None) -> Prompt:
    """The prompt file of the settings, or the shipped one. Raises SettingsError."""
    return Prompt.load(path or PROMPT, required={"prefix", "suffix"}, allowed={"bridge"})


@dataclass(frozen=True)
class Cut:
    """The first tokens of a text. `text` is theirs, without a character cut at the end and without an end-of-text."""

    token_ids: tuple[int, ...]
    text: str
    is_whole: bool
    """Nothing was cut off."""
    flaw: TextFlaw
    """Why `text` does not show all tokens; empty if it does."""


@dataclass(frozen=True)
class PolicyTokens:
    """The policy's tokenizer, for text that continues other text."""

    codec: TokenCodec

    def cut(self, text: str, max_tokens: int, *, begins: bool = False, ends: bool = False) -> Cut:
        """The first `max_tokens` tokens of `text`.

        `begins`: no text comes before it. `ends`: an end-of-text follows if there is room after the whole text.
        """
        token_ids = self.codec.encode(text) if begins else self.codec.encode_continuation(text)
        kept = token_ids[:max_tokens]
        is_whole = len(kept) == len(token_ids)
        shown = self.codec.continuation([] if begins else self.codec.anchor, kept)
        if ends and is_whole and len(kept) < max_tokens and self.codec.end is not None:
            kept = [*kept, self.codec.end]
        return Cut(tuple(kept), shown.text, is_whole, shown.flaw)


_REPLACEMENT = "\ufffd"
"""What engines show for bytes that are not a character."""
_QUOTES = " \t\r\n\"'*_`>"


class Rewriter:
    """Built once its engine has started."""

    def __init__(self, engine: Engine, *, settings: RewriterSettings, prompt: Prompt, tokens: PolicyTokens) -> None:
        self._chat = engine.has_chat_template if settings.chat is None else settings.chat
        if self._chat and not engine.has_chat_template:
            raise SettingsError(f"rewriter.chat = true, but {engine.name} has no chat template: set it to false")
        self._engine = engine
        self._settings = settings
        self._prompt = prompt
        self._tokens = tokens
        self._begins_after_bridge = prompt.ends_with("bridge")
        """The model continues from the bridge. In a chat, the bridge is the start of its answer instead of the end of
        the user's message."""

    async def rewrite(self, request: RewriteRequest) -> RewriteResponse:
        """One rewrite per item, in order. EngineError if the engine fails, never an empty rewrite."""
        prompts = await asyncio.to_thread(lambda: [self._frame(request, item) for item in request.items])
        answers = await self._engine.generate(prompts, self._sampling(request))
        # A long window has thousands of chunks: tokenizing their rewrites here would block the event loop.
        rewrites = await asyncio.to_thread(
            lambda: tuple(
                self._read(answer, request, item) for (answer,), item in zip(answers, request.items, strict=True)
            )
        )
        for rewrite in rewrites:
            outcome = rewrite.refusal or ("cut" if rewrite.finish_reason == "length" else "whole")
            metrics.rewrites_total.labels(outcome=outcome).inc()
        return RewriteResponse(rewrites=tuple((rewrite,) for rewrite in rewrites))

    def _sampling(self, request: RewriteRequest) -> Sampling:
        return Sampling.bounded(
            [self._settings.max_answer_tokens or 2 * item.max_suffix_tokens + 16 for item in request.items],
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=request.seed,
        )

    def _frame(self, request: RewriteRequest, item: RewriteItem) -> str:
        """The text for the teacher's model."""
        bridge = self._bridge(request, item)
        prefix = request.end_of_prefix(item, self._settings.max_prefix_characters)
        values = {"prefix": prefix, "suffix": request.suffix(item), "bridge": bridge}
        values[NONCE] = nonce_of(request.text, values.values())
        if not self._chat:
            return self._prompt.fill(values)
        if not self._begins_after_bridge:
            return self._engine.render_chat(self._prompt.fill(values))
        return opened(self._engine.render_chat(self._prompt.without_end("bridge").fill(values)), bridge)

    def _bridge(self, request: RewriteRequest, item: RewriteItem) -> str:
        """Empty if the prompt shows none."""
        if "bridge" not in self._prompt.placeholders:
            return ""
        num_words = self._settings.bridge_words
        return last_words(request.end_of_prefix(item, looked_at(num_words)), num_words)

    def _read(self, answer: Generation, request: RewriteRequest, item: RewriteItem) -> Rewrite:
        """The rewrite, cut to the suffix length; if it can't be a candidate, without tokens and with `refusal`.

        An answer that reaches its token limit is refused: its start may not be meant as the rewrite at all. A long
        answer that ended by itself is only cut.
        """
        suffix, phrases = request.suffix(item), self._settings.refusal_phrases
        text = self._continuation(answer.text, suffix, self._bridge(request, item))
        if _begins_with(text, phrases) and not _begins_with(suffix, phrases):
            return _refusal("refused")
        if answer.finish_reason == "length":
            return _refusal("overlong", finish_reason="length")
        if _REPLACEMENT in text and _REPLACEMENT not in suffix:
            return _refusal("broken_text")
        cut = self._tokens.cut(text, item.max_suffix_tokens, begins=item.begins_text, ends=item.ends_document)
        if cut.flaw or not cut.text.strip():
            return _refusal(cut.flaw or "empty")
        return Rewrite(text=cut.text, token_ids=cut.token_ids, finish_reason="stop" if cut.is_whole else "length")

    def _continuation(self, answer: str, suffix: str, bridge: str) -> str:
        """What follows the bridge. A chat model is asked to begin with the bridge and may repeat it."""
        if self._chat or not self._begins_after_bridge:
            rest = without_bridge(answer, bridge, suffix=suffix)
            if rest is not None:
                return rest
        if self._begins_after_bridge and bridge:
            return continued(answer, bridge=bridge, suffix=suffix)
        return joined_like(answer, suffix)


def _refusal(reason: str, *, finish_reason: str = "stop") -> Rewrite:
    return Rewrite.model_validate({"text": "", "token_ids": (), "finish_reason": finish_reason, "refusal": reason})


def _begins_with(text: str, phrases: Sequence[str]) -> bool:
    start = _plain(text)
    return any(start.startswith(_plain(phrase)) for phrase in phrases)


def _plain(text: str) -> str:
    """Without leading quotes and markdown, with straight apostrophes, in lower case."""
    return text.lstrip(_QUOTES).replace("’", "'").lower()
