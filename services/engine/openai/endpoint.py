"""One OpenAI-compatible endpoint over HTTP: request bodies out, checked answers in, every failure a clear sentence.

Plain prompts (text or token ids) go to /completions, chat prompts to /chat/completions. Errors come in two kinds. What
another prompt would not meet is about this one: PromptError (too long, or filtered) or RequestError. Everything else, a
404 after a redeploy as well as a login page, is an EngineError: the run waits until somebody has mended it.
"""

import asyncio
import os
import re
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI, DefaultAsyncHttpxClient
from pydantic import ValidationError

from services.engine.base import Prompt
from services.engine.openai.answers import Choice, read_answer
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, HeadwaterError, PromptError, RequestError
from shared.secret_urls import without_secrets

MAX_RETRIES = 3
"""By the client, with back-off or as Retry-After says: failed connections, 408, 409, 429 and 5xx."""
_UNTIL_TIMEOUT = 1_000_000
"""Retries: more than fit into any timeout."""
_SHOWN = 300
"""Characters of what the endpoint says."""
_ABOUT_THE_PROMPT = re.compile(
    r"context.{0,20}(length|size|window)|too long|longer than|content[_ ](filter|policy|management)"
    r"|max(imum)?[_ ](model|input|prompt)[_ ]?(len|tokens)",
    re.IGNORECASE | re.DOTALL,
)
"""In refusals by OpenAI, vLLM, SGLang, llama.cpp, TGI and Azure."""
_ABOUT_THE_MODEL = re.compile(r"model.{0,80}(not[ _]found|not exist)|(invalid|unknown) model", re.IGNORECASE)
"""Some proxies answer 400 where others answer 404."""

T = TypeVar("T")


class ChatPrompt(str):
    """One user message, as `render_chat` returns it, for the chat route."""

    __slots__ = ()


class StatusError(EngineError):
    """The endpoint answered with a status that is not about the prompt."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code


class Endpoint:
    def __init__(self, settings: EngineSettings) -> None:
        self.name = f"openai:{settings.model}@{without_secrets(settings.endpoint)}"
        self._settings = settings
        self._client = AsyncOpenAI(
            base_url=settings.endpoint,
            api_key=os.environ.get(settings.key_variable) or "none",
            timeout=settings.timeout_s,
            max_retries=MAX_RETRIES,
            # A redirected POST becomes a GET, and a login page would be read as an answer.
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def close(self) -> None:
        await self._client.close()

    async def wait_until_reachable(self) -> None:
        """Another container may still be loading its model: retry for `timeout_s`."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._client.with_options(max_retries=_UNTIL_TIMEOUT).models.list()
        except openai.APIStatusError as exc:
            if exc.status_code in (400, 404, 405, 501):
                return  # it answers, but lists no models
            raise self._translate(exc) from exc
        except (openai.OpenAIError, TimeoutError) as exc:
            raise EngineError(
                f"engine.endpoint {self._settings.endpoint} can't be reached within engine.timeout_s = "
                f"{self._settings.timeout_s}: check the address and whether it is running"
            ) from exc

    async def ask(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> list[Choice]:
        """The choices, at least one, by index. `prompt`: also several plain ones, in one request."""
        body = {"model": self._settings.model, **options, **self._settings.extra_body}
        if isinstance(prompt, ChatPrompt):
            path, body = "/chat/completions", body | {"messages": self._messages(prompt)}
            if self._settings.chat_template_arguments:
                body["chat_template_kwargs"] = self._settings.chat_template_arguments
        else:
            path, body = "/completions", body | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
        text = await self._bounded(self._client.post(path, cast_to=str, body=body))
        return self._read(text)

    def _messages(self, prompt: ChatPrompt) -> list[dict[str, str]]:
        return messages_of(str(prompt), system_prompt=self._settings.system_prompt)

    async def _bounded(self, call: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await call
        except TimeoutError as exc:
            late = f"{self.name} gave no answer within engine.timeout_s = {self._settings.timeout_s}"
            raise EngineError(late) from exc
        except openai.APIStatusError as exc:
            raise self._translate(exc) from exc
        except openai.OpenAIError as exc:
            raise EngineError(f"{self.name} did not answer: {exc}") from exc

    def _read(self, text: str) -> list[Choice]:
        try:
            choices = read_answer(text)
        except ValidationError as exc:
            said = f"with {_short(text)!r}" if text.strip() else "with nothing"
            raise EngineError(
                f"{self.name} answered {said}, which has no choices as OpenAI's protocol gives them: "
                "check that engine.endpoint is the base URL of an API"
            ) from exc
        if broken := {"error", "abort"} & {choice.finish_reason for choice in choices}:
            raise EngineError(f"{self.name} broke off an answer (finish_reason {broken.pop()!r})")
        if any(choice.finish_reason == "content_filter" for choice in choices):
            raise PromptError(f"{self.name} filtered the answer to this prompt (finish_reason 'content_filter')")
        return choices

    def _translate(self, exc: openai.APIStatusError) -> HeadwaterError:
        code, said = exc.status_code, _short(_said(exc))
        if code in (400, 413, 422) and not _ABOUT_THE_MODEL.search(f"{exc.code} {said}"):
            refusal = f"{self.name} refused the request with status {code}: {said}"
            found = _ABOUT_THE_PROMPT.search(f"{exc.code} {said}")
            return PromptError(refusal) if found or code == 413 else RequestError(refusal)
        return StatusError(f"{self.name} {self._reason(exc)}: {said}", code=code)

    def _reason(self, exc: openai.APIStatusError) -> str:
        code = exc.status_code
        if code in (401, 403):
            return f"refused the key in the environment variable {self._settings.key_variable}"
        if 300 <= code < 400:
            target = without_secrets(exc.response.headers.get("location", "an unnamed address"))
            return f"redirects to {_short(target)} (status {code}): name the final address in engine.endpoint"
        if code in (400, 404, 405, 410, 422):
            return f"has no such model or route (status {code}): check engine.model and engine.endpoint"
        return f"failed with status {code}"


def messages_of(text: str, *, system_prompt: str) -> list[dict[str, str]]:
    """Of a chat: the system message, if there is one, and one user message."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": text}]


def _said(exc: openai.APIStatusError) -> str:
    """The message of the error; all of the body if it is not in OpenAI's form."""
    _, _, message = exc.message.partition(" - ")
    return message or exc.response.text or exc.message


def _short(text: str) -> str:
    """On one line."""
    line = " ".join(text[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
