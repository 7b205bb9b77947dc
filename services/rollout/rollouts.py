"""POST /v1/rollouts: K continuations for every chunk of one document window. Called by the collector."""

import hashlib

from fastapi import APIRouter, Request

from services.disconnect import unless_disconnected
from services.engine.base import Engine, Generation, Sampling
from services.engine.life import EngineLife
from shared.api import Rollout, RolloutRequest, RolloutResponse


def build_router(engine: Engine, life: EngineLife) -> APIRouter:
    router = APIRouter(tags=["rollouts"])

    @router.post("/v1/rollouts")
    async def rollouts(body: RolloutRequest, request: Request) -> RolloutResponse:
        """Per start, in the order of the request, `num_rollouts` continuations of `token_ids[:start]`."""
        life.check_ready()
        return await unless_disconnected(request, sample_rollouts(engine, body))

    return router


async def sample_rollouts(engine: Engine, request: RolloutRequest) -> RolloutResponse:
    """All chunks go to the engine in one call, so that it prefills their common document once."""
    sampling = Sampling.bounded(
        request.bounds,
        num_samples=request.num_rollouts,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=spread_seed(request.seed, request.starts[0]),
    )
    prompts = [request.token_ids[:start] for start in request.starts]
    answers = await engine.generate(prompts, sampling)
    return RolloutResponse(rollouts=tuple(tuple(map(_rollout, generations)) for generations in answers))


def spread_seed(*parts: int) -> int:
    """A seed of 48 bits. Engines count on from it row by row, so neighbouring seeds must not lie side by side."""
    digest = hashlib.blake2b(".".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def _rollout(generation: Generation) -> Rollout:
    return Rollout(
        token_ids=generation.token_ids,
        text="" if generation.flaw else generation.text,
        finish_reason=generation.finish_reason,
        policy_version=generation.weight_version,
        refusal=generation.flaw,
    )
