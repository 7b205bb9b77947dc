"""What a route of an endpoint takes and gives, found out by short requests: endpoints ignore or refuse what they lack.

chat = await find_abilities(endpoint, ChatPrompt(QUESTION), constrains=True)
str(chat)    # "n, seed, temperature, 20 top log-probs, patterns; bound by max_tokens"
"""

import re
from collections.abc import Awaitable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

from services.concurrency import all_of
from services.engine.base import Prompt
from services.engine.openai.answers import Choice
from services.engine.openai.endpoint import ChatPrompt, Endpoint, StatusError
from shared.errors import HeadwaterError, RequestError

QUESTION = "Say yes or no."
_TOP_LOG_PROBS = (20, 5, 1)
"""The maxima of chat endpoints, of OpenAI's /completions, and of a policy replica."""
_BOUNDS = ("max_tokens", "max_completion_tokens")
_PROBE_TOKENS = 16
ECHO: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
"""Asks /completions for the log-probs of the prompt's own tokens."""
_NO_ROUTE = (404, 405, 501)
_UNSUPPORTED = (*_NO_ROUTE, 500)
"""Statuses with which some endpoints refuse a field that they do not know."""
_PATTERN = "[0-9]{3}"


@dataclass(frozen=True)
class Abilities:
    bound: str = "max_tokens"
    """The field that bounds the answer; reasoning models may take `max_completion_tokens` only."""
    samples: bool = False
    """Several from one request (`n`)."""
    seed: bool = False
    temperature: bool = False
    num_top: int = 0
    """Top log-probs to ask for at each token; 0: it gives none."""
    num_listed: int = 0
    """As many it listed in a probe."""
    echoes: bool = False
    """Log-probs of given tokens."""
    patterns: bool = False
    problem: str = ""
    """Why the route does not work at all; empty if it does."""

    def __str__(self) -> str:
        if self.problem:
            return f"does not work ({self.problem})"
        top = f"{self.num_listed} top log-probs" if self.num_top else "no log-probs"
        named = {"n": self.samples, "seed": self.seed, "temperature": self.temperature}
        parts = [name if has else f"no {name}" for name, has in named.items()]
        extra = [name for name, has in {"echo": self.echoes, "patterns": self.patterns}.items() if has]
        return f"{', '.join([*parts, top, *extra])}; bound by {self.bound}"


def pattern_fields(pattern: str) -> dict[str, Any]:
    """As vLLM takes them."""
    return {"structured_outputs": {"regex": pattern}} if pattern else {}


def top_fields(prompt: Prompt, num_top: int) -> dict[str, Any]:
    """Asks for the top log-probs at each token."""
    return {"logprobs": True, "top_logprobs": num_top} if isinstance(prompt, ChatPrompt) else {"logprobs": num_top}


async def find_abilities(endpoint: Endpoint, prompt: Prompt, *, constrains: bool) -> Abilities:
    """Of the route for `prompt`. EngineError if the endpoint fails rather than refuses."""
    probes = _Probes(endpoint, prompt)
    bound, problem = await probes.bound()
    if not bound:
        return Abilities(problem=problem)
    probes.limit = {bound: _PROBE_TOKENS}
    others: list[Coroutine[Any, Any, Any]] = [
        probes.samples(),
        probes.takes(seed=1),
        probes.takes(temperature=0, top_p=1.0),
        probes.top(),
        probes.echoes(),
        probes.patterns(constrains),
    ]
    samples, seed, temperature, (num_top, num_listed), echoes, patterns = await all_of(others)
    return Abilities(bound, samples, seed, temperature, num_top, num_listed, echoes, patterns)


@dataclass
class _Probes:
    endpoint: Endpoint
    prompt: Prompt
    limit: dict[str, Any] | None = None

    async def bound(self) -> tuple[str, str]:
        """The field, or empty and what the endpoint said."""
        problem = ""
        for name in _BOUNDS:
            try:
                await self.endpoint.ask(self.prompt, **{name: _PROBE_TOKENS})
            except HeadwaterError as exc:
                if not _is_refusal(exc, _NO_ROUTE):
                    raise
                problem = problem or str(exc)
            else:
                return name, ""
        return "", problem

    async def takes(self, **fields: Any) -> bool:
        return bool(await self._tried(fields))

    async def samples(self) -> bool:
        return len(await self._tried({"n": 2})) == 2

    async def top(self) -> tuple[int, int]:
        for number in _TOP_LOG_PROBS:
            found = await self._tried(top_fields(self.prompt, number))
            if found and found[0].places and found[0].places[0].likely:
                return number, len(found[0].places[0].likely)
        return 0, 0

    async def echoes(self) -> bool:
        prompt = self.prompt
        if isinstance(prompt, ChatPrompt):
            return False
        found = await self._tried(ECHO)
        if not found or not found[0].log_probs:
            return False
        # An endpoint that ignores `echo` gives the log-prob of one sampled token.
        begins = found[0].text.startswith(prompt) if isinstance(prompt, str) else found[0].log_probs[0] is None
        return begins and len(found[0].log_probs) > 1 and None not in found[0].log_probs[1:]

    async def patterns(self, constrains: bool) -> bool:
        found = await self._tried(pattern_fields(_PATTERN)) if constrains else []
        return bool(found) and re.fullmatch(_PATTERN, found[0].text.strip()) is not None

    async def _tried(self, fields: dict[str, Any]) -> list[Choice]:
        """The choices; none if the endpoint refuses the fields."""
        return await _unless_refused(self.endpoint.ask(self.prompt, **{**(self.limit or {}), **fields}))


async def _unless_refused(call: Awaitable[list[Choice]]) -> list[Choice]:
    try:
        return await call
    except HeadwaterError as exc:
        if not _is_refusal(exc, _UNSUPPORTED):
            raise
        return []


def _is_refusal(exc: HeadwaterError, codes: Collection[int]) -> bool:
    return isinstance(exc, RequestError) or (isinstance(exc, StatusError) and exc.code in codes)
