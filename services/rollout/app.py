"""The rollout service: assembled from settings, then its route `/v1/rollouts` (completions.py has the others)."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request

from services.app import create_app, unless_disconnected
from services.engine.base import Engine, Generation, Sampling
from services.engine.life import EngineLife, build_engine
from services.rollout import completions
from services.rollout.heartbeat import Heartbeat
from services.rollout.watcher import WeightWatcher, event_recorder
from services.rollout.weight_copy import WeightCopy
from shared.api import Readiness, Rollout, RolloutRequest, RolloutResponse
from shared.coordination import Coordination
from shared.engine_settings import RolloutSettings
from shared.redis import connect
from shared.seeds import derive_seed
from shared.settings import Secrets, Settings
from shared.weights.store import WeightStore

_DESCRIPTION = """Continuations sampled from the policy while it trains, with the weight version of each. The collector
calls `/v1/rollouts`; `/v1/completions` and `/v1/models` speak OpenAI's protocol."""


def build_app(settings: Settings, secrets: Secrets, *, engine: Engine | None = None) -> FastAPI:
    """`engine` replaces the one in the settings (tests)."""
    chosen = engine or build_engine(
        settings.rollout.engine, default_model=settings.policy.model, tokenizer=settings.policy.tokenizer
    )
    coordination = _connect(settings)
    watcher = _build_watcher(settings, chosen, coordination)
    life = EngineLife(chosen, build=lambda: asyncio.to_thread(watcher.catch_up))
    heartbeat = _build_heartbeat(settings, coordination, lambda: chosen.weight_version if life.ready else None)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watcher.bind(asyncio.get_running_loop())
        async with (
            heartbeat.beating() if heartbeat else contextlib.nullcontext(),
            life.lifespan(app),
            watcher.watching(lambda exc: setattr(app.state, "failure", exc)),
        ):
            yield

    def readiness() -> Readiness:
        return Readiness(
            ready=life.ready,
            service="rollout",
            engine=chosen.name,
            model=settings.rollout.engine.model or settings.policy.model,
            weight_version=chosen.weight_version,
            detail="; ".join(filter(None, (life.detail, watcher.detail))),
        )

    app = create_app(
        service="rollout",
        title="Headwater rollout",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=readiness,
        summary=lambda: "; ".join(filter(None, (life.summary, watcher.summary))),
        max_request_bytes=settings.rollout.max_request_bytes,
        lifespan=lifespan,
    )
    app.include_router(build_router(chosen, life))
    app.include_router(completions.build_router(chosen, life))
    return app


def _connect(settings: Settings) -> Coordination | None:
    """None without Redis: the newest version in the store then counts as announced, and replicas are not counted."""
    if not settings.redis.url:
        return None
    return Coordination(connect(settings.redis.url, timeout_s=settings.redis.timeout_s), settings.run.name)


def _build_watcher(settings: Settings, engine: Engine, coordination: Coordination | None) -> WeightWatcher:
    folder = settings.rollout.weights_folder or settings.run.folder / "replicas" / replica_name(settings.rollout)
    return WeightWatcher(
        store=WeightStore(settings.weight_store_url),
        copy=WeightCopy(Path(folder)),
        engine=engine,
        announced=coordination.announced_weights if coordination else None,
        record_event=event_recorder(settings),
        poll_interval_s=settings.rollout.poll_interval_s,
    )


def _build_heartbeat(
    settings: Settings, coordination: Coordination | None, served_version: Callable[[], int | None]
) -> Heartbeat | None:
    if coordination is None:
        return None
    rollout = settings.rollout
    return Heartbeat(coordination, replica_name(rollout), served_version, rollout.heartbeat_s, rollout.poll_interval_s)


def replica_name(rollout: RolloutSettings) -> str:
    """Unique among the replicas of a run, and the same after a restart."""
    return rollout.replica or f"{socket.gethostname()}-{rollout.port}"


def build_router(engine: Engine, life: EngineLife[None]) -> APIRouter:
    router = APIRouter(tags=["rollouts"])

    @router.post("/v1/rollouts")
    async def rollouts(body: RolloutRequest, request: Request) -> RolloutResponse:
        """For each start, in order, `num_rollouts` continuations of `token_ids[:start]`."""
        life.check_ready()
        return await unless_disconnected(request, sample_rollouts(engine, body))

    return router


async def sample_rollouts(engine: Engine, request: RolloutRequest) -> RolloutResponse:
    """All chunks go to the engine in one call, so that it prefills their window once."""
    sampling = Sampling.bounded(
        request.bounds,
        num_samples=request.num_rollouts,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=derive_seed(request.seed, request.starts[0], bits=48),
    )
    prompts = [request.token_ids[:start] for start in request.starts]
    answers = await engine.generate(prompts, sampling)
    return RolloutResponse(rollouts=tuple(tuple(map(_rollout, generations)) for generations in answers))


def _rollout(generation: Generation) -> Rollout:
    return Rollout(
        token_ids=generation.token_ids,
        text="" if generation.flaw else generation.text,
        finish_reason=generation.finish_reason,
        weight_version=generation.weight_version,
        refusal=generation.flaw,
    )
