"""OpenAI's /v1/completions and /v1/models on the policy, for evaluation harnesses and the official client."""

import asyncio
import itertools
import secrets
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException

from services.disconnect import unless_disconnected
from services.engine.base import Engine, Generation, Sampling, TokenScore, TokenScorer
from services.lifespan import EngineLife
from services.rollout.openai_models import (
    MODEL_ID,
    Choice,
    ChoiceLogprobs,
    CompletionRequest,
    CompletionResponse,
    ModelCard,
    ModelList,
    Usage,
)
from shared.errors import RequestError

Scored = tuple[list[TokenScore | None], int]


def build_router(engine: Engine, life: EngineLife) -> APIRouter:
    router = APIRouter(tags=["openai"])
    started_at = int(time.time())

    def card() -> ModelCard:
        return ModelCard(created=started_at, metadata={"policy_version": engine.weight_version, "engine": engine.name})

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> CompletionResponse:
        """Continue one or several prompts; with `echo` and `logprobs` score them."""
        life.check_ready()
        _check_model(body.model)
        return await unless_disconnected(request, complete(engine, body))

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The one model there is."""
        return ModelList(data=[card()])

    @router.get("/v1/models/{model}")
    async def model(model: str) -> ModelCard:
        _check_model(model)
        return card()

    return router


def _check_model(name: str) -> None:
    if name != MODEL_ID:
        raise HTTPException(404, f"no model {name!r} here: the policy is called {MODEL_ID!r}")


async def complete(engine: Engine, request: CompletionRequest) -> CompletionResponse:
    """Sample, score if log-probs are wanted, and put it in OpenAI's form."""
    prompts = [tuple(engine.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in request.prompts]
    texts = [prompt if isinstance(prompt, str) else engine.decode(prompt) for prompt in request.prompts]
    answers = await _generate(engine, request, prompts)
    choices = [
        (prompt, text, answer)
        for prompt, text, of_prompt in zip(prompts, texts, answers, strict=True)
        for answer in of_prompt
    ]
    scored = await _score(engine, request, [(prompt, answer) for prompt, _, answer in choices])
    num_prompt, num_sampled = sum(map(len, prompts)), sum(len(answer.token_ids) for *_, answer in choices)
    return CompletionResponse(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        choices=[
            _choice(engine, request, index, prompt=prompt, prompt_text=text, answer=answer, scores=scores)
            for index, ((prompt, text, answer), (scores, _)) in enumerate(zip(choices, scored, strict=True))
        ],
        usage=Usage(prompt_tokens=num_prompt, completion_tokens=num_sampled, total_tokens=num_prompt + num_sampled),
        policy_version=min(
            [answer.weight_version for *_, answer in choices] + [version for scores, version in scored if scores]
        ),
    )


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


async def _score(
    engine: Engine, request: CompletionRequest, pairs: Sequence[tuple[tuple[int, ...], Generation]]
) -> list[Scored]:
    """Per choice the scores of the tokens that its text shows; empty lists when no log-probs are wanted."""
    if request.logprobs is None:
        return [([], 0) for _ in pairs]
    if not isinstance(engine, TokenScorer):
        raise RequestError(f"{engine.name} gives no log-probs of tokens: leave logprobs out")
    scorer: TokenScorer = engine
    return await asyncio.gather(
        *(_score_shown(scorer, prompt, answer.token_ids, echo=bool(request.echo)) for prompt, answer in pairs)
    )


async def _score_shown(scorer: TokenScorer, prompt: tuple[int, ...], answer: tuple[int, ...], *, echo: bool) -> Scored:
    context, shown = (prompt[:1], prompt[1:] + answer) if echo else (prompt, answer)
    first: list[TokenScore | None] = [None] if echo else []
    if not shown:
        return first, 0
    (scores,), version = await scorer.score_tokens(context, [shown])
    return [*first, *scores], version


def _choice(
    engine: Engine,
    request: CompletionRequest,
    index: int,
    *,
    prompt: tuple[int, ...],
    prompt_text: str,
    answer: Generation,
    scores: Sequence[TokenScore | None],
) -> Choice:
    text, stopped = _cut(answer.text, request.stops)
    shown = prompt + answer.token_ids if request.echo else answer.token_ids
    whole = (prompt_text if request.echo else "") + text
    return Choice(
        index=index,
        text=whole,
        finish_reason="stop" if stopped else answer.finish_reason,
        logprobs=None
        if request.logprobs is None
        else _logprobs(engine, shown, scores, max_characters=len(whole) if stopped else None, top=request.logprobs),
    )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _logprobs(
    engine: Engine,
    token_ids: Sequence[int],
    scores: Sequence[TokenScore | None],
    *,
    max_characters: int | None,
    top: int,
) -> ChoiceLogprobs:
    """Tokens that begin at or behind `max_characters` (a stop string) are left out."""
    tokens = [engine.decode([token_id]) for token_id in token_ids]
    offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)]
    kept = len([offset for offset in offsets if max_characters is None or offset < max_characters])
    tops = [_top(engine, token, score) for token, score in zip(tokens, scores, strict=True)]
    return ChoiceLogprobs(
        tokens=tokens[:kept],
        token_logprobs=[score.log_prob if score else None for score in scores[:kept]],
        top_logprobs=tops[:kept] if top else None,
        text_offset=offsets[:kept],
    )


def _top(engine: Engine, token: str, score: TokenScore | None) -> dict[str, float] | None:
    """The most probable token, and the given one beside it where that is another."""
    if score is None:
        return None
    return {token: score.log_prob} | {engine.decode([score.best_token_id]): score.best_log_prob}
