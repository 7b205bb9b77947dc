"""Asks the teacher about each chunk: prompt -> answers -> rewrites in the policy's tokens (answers.py)."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from services.concurrency import all_of
from services.engine.base import Engine, Generation, Sampling
from services.frames import Frame, FramedPrompt, cut_prefix, nonce_of
from services.prompts import Prompt
from services.rewriter.answers import AnswerReader, Passage, PolicyTokens, refusal
from services.rewriter.bridge import last_words, looked_at
from shared import metrics
from shared.api import Rewrite, RewriteItem, RewriteRequest, RewriteResponse
from shared.engine_settings import RewriterSettings
from shared.errors import HeadwaterError, PromptError, RequestError, SettingsError
from shared.retries import Retries

PROMPT = Path(__file__).parent / "prompts" / "rewrite.txt"
MAX_TRIES = 4
"""Of one item, when the engine fails."""
MAX_RETRY_WAIT_S = 5.0
MAX_REMEMBERED = 8192
"""Finished items: some 50 MB of answers at 128 tokens."""
_log = logging.getLogger(__name__)

_Call = tuple[bytes, Sampling]
"""A prompt's key and how it is sampled."""


def load_prompt(path: Path | None) -> Prompt:
    """The prompt file of the settings, or the shipped one. Raises SettingsError."""
    return Prompt.load(path or PROMPT, required={"prefix", "suffix"}, allowed={"bridge"})


class Rewriter:
    """Built once its engine has started."""

    def __init__(self, engine: Engine, *, settings: RewriterSettings, prompt: Prompt, tokens: PolicyTokens) -> None:
        chat = engine.has_chat_template if settings.chat is None else settings.chat
        if chat and not engine.has_chat_template:
            raise SettingsError(f"rewriter.chat = true, but {engine.name} has no chat template: set it to false")
        self._engine = engine
        self._settings = settings
        self._shows_bridge = "bridge" in prompt.placeholders
        ends_with_bridge = prompt.ends_with("bridge")
        self._frame = Frame(prompt, engine, chat=chat, opens_answer=ends_with_bridge)
        self._reader = AnswerReader(settings, tokens, ends_with_bridge, chat)
        self._gate = asyncio.Semaphore(settings.engine.max_queued_requests)
        """Of all requests together: their items wait here, in order of arrival, rather than overload the engine."""
        self._retries = Retries(max_attempts=MAX_TRIES, max_wait_s=MAX_RETRY_WAIT_S, on_failure=_note_failure)
        self._finished: OrderedDict[_Call, list[Generation]] = OrderedDict()
        """For a request that is asked again, because another item of it failed or its answer came too late."""

    async def rewrite(self, request: RewriteRequest) -> RewriteResponse:
        """`num_rewrites` per item, in order. EngineError if the engine fails for an item in every try, never an empty
        rewrite."""
        nonce = await asyncio.to_thread(nonce_of, request.text, ())
        rows = range(len(request.items))
        found = await all_of(self._rewrite(request, row, nonce) for row in rows)
        refused = [error for _, error in found if isinstance(error, RequestError)]
        if len(refused) == len(found):
            raise refused[0]  # it is no single prompt that the endpoint refuses
        return RewriteResponse(rewrites=tuple(rewrites for rewrites, _ in found))

    async def _rewrite(
        self, request: RewriteRequest, row: int, nonce: str
    ) -> tuple[tuple[Rewrite, ...], HeadwaterError | None]:
        """Of one item, and why the engine refused it. What grows with its text runs in a thread."""
        item = request.items[row]
        error: HeadwaterError | None = None
        async with self._gate:
            passage = await asyncio.to_thread(self._passage, request, item)
            try:
                framed = await asyncio.to_thread(self._framed, passage, nonce)
                answers = await self._answers(framed, self._sampling(request, row))
            except (PromptError, RequestError) as exc:
                _log.info("no rewrite of characters %d to %d of a window: %s", item.start, item.end, exc)
                rewrites, error = (refusal("unanswerable"),) * request.num_rewrites, exc
            else:
                rewrites = await asyncio.to_thread(self._read, answers, passage)
        _count(rewrites)
        return rewrites, error

    def _read(self, answers: Sequence[Generation], passage: Passage) -> tuple[Rewrite, ...]:
        return tuple(self._reader.read(answer, passage) for answer in answers)

    async def _answers(self, framed: FramedPrompt, sampling: Sampling) -> list[Generation]:
        call = framed.key, sampling
        if call in self._finished:
            self._finished.move_to_end(call)
            return self._finished[call]
        (answers,) = await self._retries.wait_for(lambda: self._engine.generate([framed.build()], sampling))
        self._finished[call] = answers
        if len(self._finished) > MAX_REMEMBERED:
            self._finished.popitem(last=False)
        return answers

    def _sampling(self, request: RewriteRequest, row: int) -> Sampling:
        return Sampling(
            max_tokens=self._settings.max_answer_tokens or 2 * request.items[row].max_suffix_tokens + 16,
            num_samples=request.num_rewrites,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=request.seed + row,
        )

    def _passage(self, request: RewriteRequest, item: RewriteItem) -> Passage:
        bridge, num_words = "", self._settings.bridge_words
        if self._shows_bridge:
            bridge = last_words(request.end_of_prefix(item, looked_at(num_words)), num_words)
        prefix = cut_prefix(request.text, item.start, self._settings.max_prefix_characters)
        return Passage(prefix, request.suffix(item), bridge, item)

    def _framed(self, passage: Passage, nonce: str) -> FramedPrompt:
        texts = {"prefix": passage.prefix, "suffix": passage.suffix, "bridge": passage.bridge}
        return self._frame.join({name: self._frame.piece(name, text) for name, text in texts.items()}, nonce=nonce)


def _note_failure(attempt: int, error: BaseException) -> None:
    _log.debug("an item is tried again after attempt %d: %s", attempt, error)


def _count(rewrites: tuple[Rewrite, ...]) -> None:
    for rewrite in rewrites:
        outcome = rewrite.refusal or ("cut" if rewrite.finish_reason == "length" else "whole")
        metrics.rewrites_total.labels(outcome=outcome).inc()
