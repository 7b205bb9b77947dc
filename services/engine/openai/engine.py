"""The `Engine` on an OpenAI-compatible endpoint: prompts in, samples, scores and verdict odds out.

What the endpoint can do is found out at start (abilities.py) and logged. Scores come from the top log-probs of the next
token if all labels are among them, else from `echo` with log-probs, else from the top log-probs with a bound for what
is not listed. An unclear answer is an error: a guess would look like a score.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from services.concurrency import all_of
from services.engine.base import Generation, Prompt, Sampling, TokenSequence
from services.engine.openai.abilities import ECHO, QUESTION, Abilities, find_abilities, pattern_fields, top_fields
from services.engine.openai.answers import Choice
from services.engine.openai.endpoint import ChatPrompt, Endpoint
from services.engine.openai.log_probs import all_listed, read_echoed_scores, read_label_scores, read_word_odds
from services.engine.openai.tokenizer import EndpointTokenizer, joined, load_endpoint_tokenizer
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, OverloadedError, PromptError
from shared.seeds import question_seed

_FEWEST_TOP = 5
_LENGTH_REASONS = ("length", "max_tokens")
_log = logging.getLogger(__name__)


class OpenAIEngine:
    """See `Engine`. It has no weights, and a tokenizer only with `engine.tokenizer`."""

    weight_version = 0

    def __init__(self, settings: EngineSettings, *, constrains: bool = False) -> None:
        """`constrains`: `start` tries whether the endpoint supports `Sampling.pattern`; vLLM's do."""
        self._endpoint = Endpoint(settings)
        self.name = self._endpoint.name
        self._settings = settings
        self._constrains = constrains
        self._in_flight = 0
        self._tokenizer: EndpointTokenizer | None = None
        self.chat = self.plain = Abilities(problem="not tried")
        """Of the two routes, as found by `start`."""

    @property
    def _main(self) -> Abilities:
        """Of the route that is used unless somebody sends plain text to a chat endpoint."""
        return self.plain if self.chat.problem else self.chat

    @property
    def can_score(self) -> bool:
        """Labels at least can be scored."""
        return self.plain.echoes or self.plain.num_top > 0 or self.chat.num_top > 0

    @property
    def can_grade(self) -> bool:
        return self._main.num_top > 0

    @property
    def can_constrain(self) -> bool:
        return self._main.patterns

    @property
    def has_tokenizer(self) -> bool:
        return bool(self._settings.tokenizer)

    @property
    def has_chat_template(self) -> bool:
        """Without a tokenizer here the endpoint applies the template itself, if its chat route works."""
        return not self.chat.problem if self._tokenizer is None else self._tokenizer.has_chat_template

    async def start(self) -> None:
        """Wait until the endpoint answers, then find out what it can do. EngineError if neither route works."""
        await self._endpoint.wait_until_reachable()
        if self.has_tokenizer:
            self._tokenizer = await load_endpoint_tokenizer(self._settings)
        else:
            self.chat = await self._abilities(ChatPrompt(QUESTION))
        self.plain = await self._abilities(self._as_sent(QUESTION))
        if self._main.problem:
            tried = self._main if self.has_tokenizer else self.chat
            raise EngineError(f"no route works: {tried.problem}")
        _log.info("%s: %s", self.name, self.summary, extra={"engine": self.name})

    @property
    def summary(self) -> str:
        """What the endpoint can do."""
        if self.has_tokenizer:
            return f"token ids at /completions: {self.plain}"
        routes = {"/chat/completions": self.chat, "/completions": self.plain}
        return "; ".join(f"{path}: {'does not work' if found.problem else found}" for path, found in routes.items())

    async def _abilities(self, prompt: Prompt) -> Abilities:
        return await find_abilities(self._endpoint, prompt, constrains=self._constrains)

    async def close(self) -> None:
        await self._endpoint.close()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        return await all_of(self._generate(prompt, sampling, row) for row, prompt in enumerate(prompts))

    async def _generate(self, prompt: Prompt, sampling: Sampling, row: int) -> list[Generation]:
        if sampling.adapter:
            self._refuse("has no adapters here: name the adapter's model in engine.model")
        route, number, seed = self._route(prompt), sampling.num_samples, sampling.seed + row
        if sampling.pattern and not route.patterns:
            raise PromptError(f"{self.name} holds no answer to a pattern")
        options = self._options(route, prompt, sampling) | {route.bound: sampling.bound(row)}
        with self._place():
            if number == 1 or route.samples:
                several = {"n": number} if number > 1 else {}
                choices = await self._endpoint.ask(self._as_sent(prompt), **options, **several, **_seed(route, seed))
            else:
                choices = await self._one_by_one(route, self._as_sent(prompt), options, number, seed)
        if len(choices) < number:
            raise EngineError(f"{self.name} gave {len(choices)} samples, {number} were asked for")
        return [_generation(choice, sampling.words) for choice in choices[:number]]

    async def _one_by_one(
        self, route: Abilities, prompt: Prompt, options: dict[str, Any], number: int, seed: int
    ) -> list[Choice]:
        """From an endpoint that ignores `n`: one request a sample, each with a seed of its own."""
        seeds = [seed, *(question_seed(seed, place) for place in range(1, number))]
        found = await all_of(self._endpoint.ask(prompt, **options, **_seed(route, one)) for one in seeds)
        return [choices[0] for choices in found]

    def _options(self, route: Abilities, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        options = pattern_fields(sampling.pattern)
        if route.temperature:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.words and route.num_top:
            # Reading all that could be listed at each token of an answer would block the event loop.
            num_forms = 2 * len(sampling.words) + 1
            options |= top_fields(prompt, min(route.num_top, max(_FEWEST_TOP, num_forms)))
        return options

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        if adapter:
            self._refuse("has no adapters here: name the adapter's model in engine.model")
        if not continuations:
            return []
        route, sent = self._route(prompt), self._as_sent(prompt)
        if not route.num_top and not route.echoes:
            self._refuse("gives no log-probs: use verdict = 'answer'")
        with self._place():
            if not route.echoes or (route.num_top > 1 and all(isinstance(given, str) for given in continuations)):
                likely = await self._next_token(route, sent)
                if not route.echoes or all_listed(likely, continuations):
                    return read_label_scores(likely, continuations, name=self.name)
            return await self._echoed(sent, continuations)

    async def _next_token(self, route: Abilities, prompt: Prompt) -> Mapping[str, float]:
        """Log-probs of the likeliest next tokens, by text."""
        options = top_fields(prompt, route.num_top) | {route.bound: 1}
        choice, *_ = await self._endpoint.ask(prompt, **options, **({"temperature": 0} if route.temperature else {}))
        return choice.places[0].likely if choice.places else {}

    async def _echoed(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
        sent = continuations
        if self._tokenizer is not None:
            sent = [self._tokenizer.ids(continuation) for continuation in continuations]
        choices = await self._endpoint.ask([joined(prompt, continuation) for continuation in sent], **ECHO)
        return read_echoed_scores(choices, prompt, sent, name=self.name)

    def _route(self, prompt: Prompt) -> Abilities:
        is_chat = isinstance(prompt, ChatPrompt)
        route = self.chat if is_chat else self.plain
        if route.problem:
            name = "/chat/completions" if is_chat else "/completions"
            raise EngineError(f"{self.name} can't be asked at {name} (`chat` decides which): {route.problem}")
        return route

    def _as_sent(self, prompt: Prompt) -> Prompt:
        return prompt if self._tokenizer is None else self._tokenizer.ids(prompt)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One in the bounded queue."""
        if self._in_flight >= self._settings.max_queued_requests:
            raise OverloadedError(f"{self._in_flight} requests wait for {self.name}: engine.max_queued_requests")
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def encode(self, text: str) -> list[int]:
        return self._tokens.encode(text)

    def encode_content(self, text: str) -> list[int]:
        return self._tokens.encode_content(text)

    def decode(self, token_ids: TokenSequence) -> str:
        return self._tokens.decode(token_ids)

    def render_chat(self, prompt: str) -> str:
        """Without a tokenizer a user message for the chat route, whose template the endpoint applies itself."""
        return ChatPrompt(prompt) if self._tokenizer is None else self._tokenizer.render(prompt)

    @property
    def _tokens(self) -> EndpointTokenizer:
        if self._tokenizer is None:
            self._refuse("is still starting" if self.has_tokenizer else "has no tokenizer here: set engine.tokenizer")
        return self._tokenizer

    async def load_weights(self, folder: Path, version: int) -> None:
        self._refuse("can't load weights: the rollout service needs engine.kind = 'vllm' or 'transformers'")

    def _refuse(self, what: str) -> NoReturn:
        raise EngineError(f"{self.name} {what}")


def _seed(route: Abilities, seed: int) -> dict[str, int]:
    return {"seed": seed % 2**63} if route.seed else {}


def _generation(choice: Choice, words: Sequence[str]) -> Generation:
    reason: Literal["length", "stop"] = "length" if choice.finish_reason in _LENGTH_REASONS else "stop"
    return Generation((), choice.text, reason, 0, word_odds=read_word_odds(choice, words))
