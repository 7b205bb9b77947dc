"""OpenAI's /v1/completions and /v1/models on the policy, for evaluation harnesses and the official client.

    prompts -> token ids -> engine.generate -> engine.score_tokens, if log-probs are wanted -> JSON

What grows with the number of tokens runs in a thread: the event loop also serves the collector and the probes.
"""

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from services.app import unless_disconnected
from services.engine.base import Engine, Generation, Sampling, TokenScore, TokenScorer
from services.engine.life import EngineLife
from services.rollout.openai_models import (
    MODEL_ID,
    Choice,
    ChoiceLogprobs,
    CompletionRequest,
    CompletionResponse,
    ModelCard,
    ModelList,
    TopLogprobs,
    Usage,
)
from shared.errors import RequestError

Scored = tuple[list[TokenScore | None], int]
"""Scores of the tokens in a choice's text, and the weight version that computed them."""


TokenText = Callable[[int], str]
"""The text of a single token."""


@dataclass(frozen=True)
class Sample:
    """One continuation of one prompt."""

    prompt: tuple[int, ...]
    prompt_text: str
    answer: Generation


def build_router(engine: Engine, life: EngineLife[None]) -> APIRouter:
    router = APIRouter(tags=["openai"])
    started_at = int(time.time())
    token_text = functools.cache(lambda token_id: engine.decode([token_id]))

    def card() -> ModelCard:
        return ModelCard(created=started_at, metadata={"weight_version": engine.weight_version, "engine": engine.name})

    @router.post("/v1/completions", response_model=CompletionResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts, or score them with `echo` and `logprobs`."""
        life.check_ready()
        _check_model(body.model)
        return await unless_disconnected(request, complete(engine, token_text, body))

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The only model."""
        return ModelList(data=[card()])

    @router.get("/v1/models/{model}")
    async def model(model: str) -> ModelCard:
        _check_model(model)
        return card()

    return router


def _check_model(name: str) -> None:
    if name != MODEL_ID:
        raise HTTPException(404, f"there is no model {name!r}: the policy is called {MODEL_ID!r}")


async def complete(engine: Engine, token_text: TokenText, request: CompletionRequest) -> Response:
    prompts = await asyncio.to_thread(lambda: [_read_prompt(engine, prompt) for prompt in request.prompts])
    answers = await _generate(engine, request, [token_ids for token_ids, _ in prompts])
    samples = [
        Sample(token_ids, text, answer)
        for (token_ids, text), of_prompt in zip(prompts, answers, strict=True)
        for answer in of_prompt
    ]
    scored = await _score(engine, request, samples)
    num_prompt_tokens = sum(len(token_ids) for token_ids, _ in prompts)
    content = await asyncio.to_thread(_render, request, samples, scored, token_text, num_prompt_tokens)
    return Response(content, media_type="application/json")


def _read_prompt(engine: Engine, prompt: str | Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Token ids and text; one of them was given."""
    if isinstance(prompt, str):
        return tuple(engine.encode(prompt)), prompt
    return tuple(prompt), engine.decode(prompt)


async def _generate(
    engine: Engine, request: CompletionRequest, prompts: Sequence[tuple[int, ...]]
) -> list[list[Generation]]:
    if request.max_tokens == 0:
        return [[Generation((), "", "length", engine.weight_version)] * request.n for _ in prompts]
    sampling = Sampling(
        max_tokens=16 if request.max_tokens is None else request.max_tokens,
        num_samples=request.n,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(48) if request.seed is None else request.seed,
    )
    return await engine.generate(prompts, sampling)


async def _score(engine: Engine, request: CompletionRequest, samples: Sequence[Sample]) -> list[Scored]:
    """For each choice the scores of the tokens in its text; empty if no log-probs are wanted."""
    if request.logprobs is None:
        return [([], 0) for _ in samples]
    if not isinstance(engine, TokenScorer):
        raise RequestError(f"the engine {engine.name} has no log-probs of tokens: leave out logprobs")
    return await asyncio.gather(*(_score_shown(engine, sample, echo=bool(request.echo)) for sample in samples))


async def _score_shown(scorer: TokenScorer, sample: Sample, *, echo: bool) -> Scored:
    prompt, answer = sample.prompt, sample.answer.token_ids
    context, shown = (prompt[:1], prompt[1:] + answer) if echo else (prompt, answer)
    first: list[TokenScore | None] = [None] if echo else []
    if not shown:
        return first, 0
    (scores,), version = await scorer.score_tokens(context, [shown])
    return [*first, *scores], version


def _render(
    request: CompletionRequest,
    samples: Sequence[Sample],
    scored: Sequence[Scored],
    token_text: TokenText,
    num_prompt_tokens: int,
) -> str:
    """The answer as JSON."""
    num_sampled = sum(len(sample.answer.token_ids) for sample in samples)
    num_tokens = num_prompt_tokens + num_sampled
    versions = [sample.answer.weight_version for sample in samples]
    answer = CompletionResponse(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        choices=[],
        usage=Usage(prompt_tokens=num_prompt_tokens, completion_tokens=num_sampled, total_tokens=num_tokens),
        weight_version=min(versions + [version for scores, version in scored if any(scores)]),
    )
    # Choice by choice: while pydantic serializes a record no other thread runs, not even the event loop's.
    choices = [
        _choice(request, index, sample, scores, token_text).model_dump_json()
        for index, (sample, (scores, _)) in enumerate(zip(samples, scored, strict=True))
    ]
    frame = answer.model_dump_json(exclude={"choices"})
    return f'{frame[:-1]},"choices":[{",".join(choices)}]}}'


def _choice(
    request: CompletionRequest, index: int, sample: Sample, scores: Sequence[TokenScore | None], token_text: TokenText
) -> Choice:
    answer = sample.answer
    text, stopped = _cut(answer.text, request.stops)
    token_ids = answer.token_ids
    if request.echo:
        text, token_ids = sample.prompt_text + text, sample.prompt + token_ids
    logprobs = None
    if request.logprobs is not None:
        logprobs = _logprobs(token_ids, scores, token_text, len(text) if stopped else None, top=bool(request.logprobs))
    return Choice(index=index, text=text, finish_reason="stop" if stopped else answer.finish_reason, logprobs=logprobs)


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether it had one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _logprobs(
    token_ids: Sequence[int],
    scores: Sequence[TokenScore | None],
    token_text: TokenText,
    max_characters: int | None,
    *,
    top: bool,
) -> ChoiceLogprobs:
    """Without the tokens that begin at or after `max_characters`, where a stop string cut the text."""
    tokens = list(map(token_text, token_ids))
    offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)]
    kept = len([offset for offset in offsets if max_characters is None or offset < max_characters])
    return ChoiceLogprobs(
        tokens=tokens[:kept],
        token_logprobs=[score.log_prob if score else None for score in scores[:kept]],
        top_logprobs=_tops(tokens[:kept], scores[:kept], token_text) if top else None,
        text_offset=offsets[:kept],
    )


def _tops(tokens: Sequence[str], scores: Sequence[TokenScore | None], token_text: TokenText) -> list[TopLogprobs]:
    """For each place the given token and the most probable one, which may be the same."""
    return [
        {token: score.log_prob} | {token_text(score.best_token_id): score.best_log_prob} if score else None
        for token, score in zip(tokens, scores, strict=True)
    ]
