"""Asks the teacher for rewrites: all chunks of a request in one engine call, so that they share its batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.engine.base import Engine, Generation, Sampling
from services.prompts import Prompt, opened
from services.rewriter.bridge import last_words, looked_at
from services.rewriter.cutting import PolicyTokens
from services.rewriter.reading import AnswerReader
from shared import metrics
from shared.api import Rewrite, RewriteItem, RewriteRequest, RewriteResponse
from shared.errors import SettingsError
from shared.settings import RewriterSettings

PROMPT = Path(__file__).parent / "prompts" / "rewrite.txt"


def load_prompt(path: Path | None) -> Prompt:
    """The file of the settings or the shipped one. Raises SettingsError."""
    return Prompt.load(path or PROMPT, required={"prefix", "suffix"}, allowed={"bridge"})


@dataclass(frozen=True)
class Framing:
    """How a chunk is put to the teacher's model.

    A prompt that ends with {bridge} is continued from there; under a chat template the bridge then opens the model's
    own answer instead of ending the user's message.
    """

    prompt: Prompt
    chat: bool
    bridge_words: int
    max_prefix_characters: int

    def frame(self, request: RewriteRequest, item: RewriteItem, engine: Engine) -> str:
        bridge = self.bridge(request, item)
        prefix = request.end_of_prefix(item, self.max_prefix_characters)
        values = {"prefix": prefix, "suffix": request.suffix(item), "bridge": bridge}
        if not self.chat:
            return self.prompt.fill(values)
        if not self.begins_after_bridge:
            return engine.render_chat(self.prompt.fill(values))
        return opened(engine.render_chat(self.prompt.without_end("bridge").fill(values)), bridge)

    def bridge(self, request: RewriteRequest, item: RewriteItem) -> str:
        """Empty where the prompt shows none."""
        if "bridge" not in self.prompt.placeholders:
            return ""
        return last_words(request.end_of_prefix(item, looked_at(self.bridge_words)), self.bridge_words)

    @property
    def begins_after_bridge(self) -> bool:
        return self.prompt.ends_with("bridge")


class Rewriter:
    """Ready to rewrite: its engine has started."""

    def __init__(self, engine: Engine, *, settings: RewriterSettings, prompt: Prompt, tokens: PolicyTokens) -> None:
        chat = engine.has_chat_template if settings.chat is None else settings.chat
        if chat and not engine.has_chat_template:
            raise SettingsError(f"rewriter.chat = true, but {engine.name} has no chat template: set it to false")
        self._engine = engine
        self._settings = settings
        self._framing = Framing(prompt, chat, settings.bridge_words, settings.max_prefix_characters)
        begins_after_bridge = self._framing.begins_after_bridge
        self._reader = AnswerReader(
            tokens,
            settings.refusal_phrases,
            begins_after_bridge=begins_after_bridge,
            # A chat model was asked to begin with the bridge and may do so although it is already there.
            may_repeat_bridge=chat or not begins_after_bridge,
        )

    async def rewrite(self, request: RewriteRequest) -> RewriteResponse:
        """One rewrite per item, in their order. Raises EngineError, never an empty rewrite, where the engine fails."""
        prompts = await asyncio.to_thread(self._frame, request)
        answers = await self._engine.generate(prompts, self._sampling(request))
        # A long window has thousands of chunks: tokenizing their rewrites would hold up everybody else.
        rewrites = await asyncio.to_thread(self._read, request, [generations[0] for generations in answers])
        _count(rewrites)
        return RewriteResponse(rewrites=tuple(rewrites))

    def _frame(self, request: RewriteRequest) -> list[str]:
        return [self._framing.frame(request, item, self._engine) for item in request.items]

    def _read(self, request: RewriteRequest, answers: Sequence[Generation]) -> list[Rewrite]:
        return [
            self._reader.read(answer, request, item, bridge=self._framing.bridge(request, item))
            for answer, item in zip(answers, request.items, strict=True)
        ]

    def _sampling(self, request: RewriteRequest) -> Sampling:
        return Sampling.bounded(
            [self._settings.max_answer_tokens or 2 * item.max_suffix_tokens + 16 for item in request.items],
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=request.seed,
        )


def _count(rewrites: list[Rewrite]) -> None:
    for rewrite in rewrites:
        outcome = rewrite.refusal or ("cut" if rewrite.finish_reason == "length" else "whole")
        metrics.rewrites_total.labels(outcome=outcome).inc()
