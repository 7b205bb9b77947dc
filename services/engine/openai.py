"""The engine for any OpenAI-compatible endpoint, through the official client, which also does the retries.

Plain prompts (text or token ids) go to /completions, prompts from `render_chat` to /chat/completions. Scores come from
`echo` with log-probs if the endpoint supports that, otherwise from the top log-probs of the next token, which is enough
for one-token labels. An unclear answer is an error: a guess would look like a score.
"""

import asyncio
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import openai
from openai import AsyncOpenAI
from openai.types import Completion, CompletionChoice

from services.concurrency import all_of
from services.engine.base import Generation, Prompt, Sampling, TokenSequence
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, HeadwaterError, OverloadedError, PromptError, RequestError
from shared.secret_urls import without_secrets

MAX_RETRIES = 3
"""By the client, with back-off or as Retry-After says: failed connections, 408, 409, 429 and 5xx."""
TOP_LOGPROBS = 20
"""The maximum of chat endpoints; that of OpenAI's /completions is 5."""
_UNTIL_TIMEOUT = 1_000_000
"""Retries: more than fit into any timeout."""
_ECHO: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}


class ChatPrompt(str):
    """One user message, as `render_chat` returns it, for the chat route."""

    __slots__ = ()


class OpenAIEngine:
    """See `Engine`. It has no tokenizer and no weights."""

    weight_version = 0
    has_chat_template = True
    can_grade = has_tokenizer = False

    def __init__(self, settings: EngineSettings, *, constrains: bool = False) -> None:
        """`constrains`: `start` tries whether the endpoint supports `Sampling.pattern`; vLLM's do."""
        self.name = f"openai:{settings.model}@{without_secrets(settings.endpoint)}"
        self._settings = settings
        self._constrains = constrains
        self._in_flight = 0
        self._echoes = self._gives_top = self.can_constrain = False
        self._client = AsyncOpenAI(
            base_url=settings.endpoint,
            api_key=os.environ.get(settings.key_variable) or "none",
            timeout=settings.timeout_s,
            max_retries=MAX_RETRIES,
        )

    @property
    def can_score(self) -> bool:
        """As probed by `start`: one-token labels at least can be scored."""
        return self._echoes or self._gives_top

    async def start(self) -> None:
        """Wait until the endpoint answers, then probe what it supports."""
        await self._wait_until_reachable()
        self._echoes = await self._supports(self._probe_echo)
        self._gives_top = await self._supports(self._probe_top)
        self.can_constrain = self._constrains and await self._supports(self._probe_pattern)

    async def close(self) -> None:
        await self._client.close()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        return await all_of(self._generate(prompt, sampling, row) for row, prompt in enumerate(prompts))

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        if not continuations:
            return []
        if isinstance(prompt, ChatPrompt) or not self._echoes:
            if not self._gives_top:
                self._refuse("gives no log-probs: use verdict = 'answer'")
            return read_label_scores(await self._next_token(prompt), continuations, name=self.name)
        answer = await self._ask([_join(prompt, continuation) for continuation in continuations], **_ECHO)
        return read_echoed_scores(answer, prompt, continuations)

    def encode(self, text: str) -> list[int]:
        self._refuse("has no tokenizer here")

    def encode_content(self, text: str) -> list[int]:
        self._refuse("has no tokenizer here")

    def decode(self, token_ids: TokenSequence) -> str:
        self._refuse("has no tokenizer here")

    def render_chat(self, prompt: str) -> str:
        """The endpoint applies the template itself."""
        return ChatPrompt(prompt)

    async def load_weights(self, folder: Path, version: int) -> None:
        self._refuse("can't load weights: the rollout service needs engine.kind = 'vllm' or 'transformers'")

    def _refuse(self, what: str) -> NoReturn:
        raise EngineError(f"{self.name} {what}")

    async def _generate(self, prompt: Prompt, sampling: Sampling, row: int) -> list[Generation]:
        answer = await self._ask(
            prompt,
            n=sampling.num_samples,
            max_tokens=sampling.bound(row),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=(sampling.seed + row) % 2**63,
            extra_body={"structured_outputs": {"regex": sampling.pattern}} if sampling.pattern else None,
        )
        if len(answer.choices) != sampling.num_samples:
            raise EngineError(f"{self.name} gave {len(answer.choices)} samples, {sampling.num_samples} were asked for")
        generations = []
        for choice in answer.choices:
            text = (choice.message.content or "") if isinstance(prompt, ChatPrompt) else choice.text
            generations.append(Generation((), text, "length" if choice.finish_reason == "length" else "stop", 0))
        return generations

    async def _ask(self, prompt: Any, **options: Any) -> Any:
        """What the route for the prompt answers: one place in the bounded queue, for a bounded time."""
        if self._in_flight >= self._settings.max_queued_requests:
            raise OverloadedError(f"{self._in_flight} requests wait for {self.name}: engine.max_queued_requests")
        self._in_flight += 1
        options["model"] = self._settings.model
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                if isinstance(prompt, ChatPrompt):
                    messages: Any = [{"role": "user", "content": str(prompt)}]
                    return await self._client.chat.completions.create(messages=messages, **options)
                plain = prompt if isinstance(prompt, str) else list(prompt)
                return await self._client.completions.create(prompt=plain, **options)
        except TimeoutError as exc:
            late = f"{self.name} gave no answer within engine.timeout_s = {self._settings.timeout_s}"
            raise EngineError(late) from exc
        except openai.APIStatusError as exc:
            raise self._translate(exc) from exc
        except openai.OpenAIError as exc:
            raise EngineError(f"{self.name} did not answer: {exc}") from exc
        finally:
            self._in_flight -= 1

    async def _next_token(self, prompt: Prompt) -> dict[str, float]:
        """Log-probs of the likeliest next tokens, by text."""
        is_chat = isinstance(prompt, ChatPrompt)
        wanted = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if is_chat else {"logprobs": 5}
        answer = await self._ask(prompt, max_tokens=1, temperature=0, **wanted)
        logprobs = answer.choices[0].logprobs if answer.choices else None
        if is_chat:
            content = logprobs.content if logprobs else None
            return {token.token: token.logprob for token in content[0].top_logprobs} if content else {}
        return dict(logprobs.top_logprobs[0]) if logprobs and logprobs.top_logprobs else {}

    def _translate(self, exc: openai.APIStatusError) -> HeadwaterError:
        if exc.status_code in (401, 403):
            variable = self._settings.key_variable
            return EngineError(f"{self.name} refused the key in the environment variable {variable}: {exc.message}")
        if exc.status_code in (408, 409, 429) or exc.status_code >= 500:
            return EngineError(f"{self.name} failed with status {exc.status_code}: {exc.message}")
        return RequestError(f"{self.name} refused the request with status {exc.status_code}: {exc.message}")

    async def _wait_until_reachable(self) -> None:
        """Another container may still be loading its model: retry for `timeout_s`."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._client.with_options(max_retries=_UNTIL_TIMEOUT).models.list()
        except (openai.NotFoundError, openai.BadRequestError):
            return  # it answers, but lists no models
        except openai.APIStatusError as exc:
            raise self._translate(exc) from exc
        except (openai.OpenAIError, TimeoutError) as exc:
            raise EngineError(
                f"engine.endpoint {self._settings.endpoint} can't be reached within engine.timeout_s = "
                f"{self._settings.timeout_s}: check the address and whether it is running"
            ) from exc

    async def _supports(self, probe: Any) -> bool:
        try:
            return bool(await probe())
        except RequestError:
            return False

    async def _probe_echo(self) -> bool:
        answer = await self._ask("a b c", **_ECHO)
        choice = answer.choices[0] if answer.choices else None
        found = choice.logprobs.token_logprobs if choice and choice.logprobs else None
        return len(found or []) > 1 and bool(answer.choices[0].text.startswith("a b c"))

    async def _probe_top(self) -> bool:
        return bool(await self._next_token(ChatPrompt("Say yes or no.")))

    async def _probe_pattern(self) -> bool:
        sampling = Sampling(max_tokens=8, temperature=0, pattern="[0-9]{3}")
        ((answer,),) = await self.generate([ChatPrompt("Say yes or no.")], sampling)
        return re.fullmatch(sampling.pattern, answer.text.strip()) is not None


def _join(prompt: Prompt, continuation: Prompt) -> Any:
    if isinstance(prompt, str) and isinstance(continuation, str):
        return prompt + continuation
    if isinstance(prompt, str) or isinstance(continuation, str):
        raise RequestError("prompt and continuation must both be text or both token ids")
    return [*prompt, *continuation]


def read_echoed_scores(answer: Completion, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
    """From one choice per continuation: prompt + continuation, echoed with log-probs, and one sampled token."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if len(choices) != len(continuations):
        raise EngineError(f"the endpoint answered {len(choices)} of {len(continuations)} prompts")
    return [_of_choice(choice, prompt, given) for choice, given in zip(choices, continuations, strict=True)]


def read_label_scores(top: Mapping[str, float], labels: Sequence[Prompt], *, name: str) -> list[list[float]]:
    """From the top log-probs of the next token. A label that is not among them raises PromptError.

    A chat answer begins without a space, so " A" and "A" count as the same label and their probabilities are added.
    """
    scores = []
    for label in labels:
        if not isinstance(label, str):
            raise PromptError(f"{name} can score text labels of one token only, got token ids")
        forms = {label, label.lstrip(" ")} & top.keys()
        if not forms:
            found = f"not among the {len(top)} likeliest next tokens"
            raise PromptError(f"{name}: {label!r} is {found}, so it has no score")
        scores.append([math.log(sum(math.exp(top[form]) for form in forms))])
    return scores


def _of_choice(choice: CompletionChoice, prompt: Prompt, continuation: Prompt) -> list[float]:
    log_probs = choice.logprobs.token_logprobs if choice.logprobs else None
    if not log_probs:
        raise EngineError("the endpoint echoed no log-probs")
    if not len(continuation):
        raise PromptError("a continuation is empty: there is no token to score")
    begin, end = len(prompt), len(prompt) + len(continuation)
    if isinstance(prompt, str):
        begin, end = _token_range(choice, begin, end)
    found = log_probs[begin:end]
    if len(found) < end - begin or any(value is None for value in found):
        raise EngineError(f"the endpoint gave {len(found)} log-probs for {end - begin} tokens of a continuation")
    return [float(value) for value in found]


def _token_range(choice: CompletionChoice, begin: int, end: int) -> tuple[int, int]:
    """Index range of the tokens that make up characters begin..end of the echoed text."""
    offsets = (choice.logprobs.text_offset if choice.logprobs else None) or []
    if begin not in offsets:
        raise PromptError("the boundary between prompt and continuation falls inside one of the endpoint's tokens")
    first = offsets.index(begin)
    return first, next((index for index, offset in enumerate(offsets) if offset >= end), len(offsets))
