"""OpenAI's /v1/completions and /v1/models on the policy, for evaluation harnesses and the official client."""

import asyncio
import secrets
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from services.disconnect import unless_disconnected
from services.engine.base import Engine, Generation, Sampling, TokenScore, TokenScorer
from services.engine.life import EngineLife
from services.rollout.completion_answers import Sample, Scored, TokenTexts, render
from services.rollout.openai_models import MODEL_ID, CompletionRequest, CompletionResponse, ModelCard, ModelList
from shared.errors import RequestError


def build_router(engine: Engine, life: EngineLife) -> APIRouter:
    router = APIRouter(tags=["openai"])
    started_at = int(time.time())
    texts = TokenTexts(engine)

    def card() -> ModelCard:
        return ModelCard(created=started_at, metadata={"policy_version": engine.weight_version, "engine": engine.name})

    @router.post("/v1/completions", response_model=CompletionResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts; with `echo` and `logprobs` score them."""
        life.check_ready()
        _check_model(body.model)
        return await unless_disconnected(request, complete(engine, texts, body))

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


async def complete(engine: Engine, texts: TokenTexts, request: CompletionRequest) -> Response:
    """Sample, score if log-probs are wanted, and put it in OpenAI's form.

    What grows with the tokens is done in a thread: the loop also serves the collector and the probes.
    """
    prompts = await asyncio.to_thread(lambda: [_read_prompt(engine, prompt) for prompt in request.prompts])
    answers = await _generate(engine, request, [token_ids for token_ids, _ in prompts])
    samples = [
        Sample(token_ids, text, answer)
        for (token_ids, text), of_prompt in zip(prompts, answers, strict=True)
        for answer in of_prompt
    ]
    scored = await _score(engine, request, samples)
    num_prompt_tokens = sum(len(token_ids) for token_ids, _ in prompts)
    content = await asyncio.to_thread(
        render, request, samples, scored, texts=texts, num_prompt_tokens=num_prompt_tokens
    )
    return Response(content, media_type="application/json")


def _read_prompt(engine: Engine, prompt: str | Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Token ids and text, whichever of them was given."""
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
    """Per choice the scores of the tokens that its text shows; empty lists when no log-probs are wanted."""
    if request.logprobs is None:
        return [([], 0) for _ in samples]
    if not isinstance(engine, TokenScorer):
        raise RequestError(f"{engine.name} gives no log-probs of tokens: leave logprobs out")
    scorer: TokenScorer = engine
    return await asyncio.gather(
        *(_score_shown(scorer, one.prompt, one.answer.token_ids, echo=bool(request.echo)) for one in samples)
    )


async def _score_shown(scorer: TokenScorer, prompt: tuple[int, ...], answer: tuple[int, ...], *, echo: bool) -> Scored:
    context, shown = (prompt[:1], prompt[1:] + answer) if echo else (prompt, answer)
    first: list[TokenScore | None] = [None] if echo else []
    if not shown:
        return first, 0
    (scores,), version = await scorer.score_tokens(context, [shown])
    return [*first, *scores], version
