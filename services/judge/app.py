"""The judge as an HTTP service: POST /v1/judgements."""

import asyncio
import logging
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request

from services.app import create_app, unless_disconnected
from services.engine.base import Engine
from services.engine.life import EngineLife
from services.judge.build import Parts, build_judge, check_engine, load_parts
from services.judge.engines import JudgeEngines
from services.judge.judge import Judge
from services.judge.likelihood import token_reading
from shared import metrics
from shared.api import JudgementRequest, JudgementResponse, Readiness
from shared.errors import TokenIdsNeededError
from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)

_DESCRIPTION = """Scores the candidates of chunks by the configured criteria and combines them into one reward each.
The window is raw text; the judge is not told which candidate is the original, the rewrite or a rollout."""


def build_app(settings: Settings, secrets: Secrets, *, engine: Engine | None = None) -> FastAPI:
    """`engine` replaces the one in the settings (tests). SettingsError for a prompt or function that can't be used."""
    parts = load_parts(settings.judge)
    engines = JudgeEngines.of(settings.judge, replacement=engine)
    life = EngineLife(engines, build=lambda: _open(settings, parts, engines))
    asks = any(settings.judge.asks_model(name) for name in settings.judge.criteria)

    def readiness() -> Readiness:
        return Readiness(
            ready=life.ready,
            service="judge",
            engine=settings.judge.engine.kind if asks else "none",
            model=settings.judge.engine.model,
            fingerprint=life.service.fingerprint if life.ready else "",
            detail=life.detail,
        )

    app = create_app(
        service="judge",
        title="Headwater judge",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=readiness,
        summary=lambda: life.summary,
        max_request_bytes=settings.judge.max_request_bytes,
        lifespan=life.lifespan,
    )

    @app.post("/v1/judgements", response_model=JudgementResponse, responses=_RESPONSES)
    async def judgements(body: Annotated[JudgementRequest, Body()], request: Request) -> JudgementResponse:
        """Score the candidates of each chunk. A chunk that can't be scored is a failure with its reason and its
        calls; an engine that fails is a 503 for the whole request."""
        return await unless_disconnected(request, life.service.judge(body))

    return app


async def _open(settings: Settings, parts: Parts, engines: JudgeEngines) -> Judge:
    """The judge on its started engines."""
    for name, engine in engines.by_criterion.items():
        check_engine(settings.judge, name, engine)  # before the tokenizers are loaded
    compared = [name for name in settings.judge.criteria if settings.judge.kind(name) == "likelihood"]
    readings = {name: await asyncio.to_thread(token_reading, settings, name) for name in compared}
    judge = build_judge(
        settings.judge,
        parts,
        engines=engines.by_criterion,
        readings=readings,
        classifiers=engines.classifiers,
    )
    metrics.judge_info.labels(judge.fingerprint).set(1)
    found = {"fingerprint": judge.fingerprint, "engine": engines.name, "criteria": list(settings.judge.criteria)}
    _log.info("judge ready", extra=found | {"scores_policy_tokens": judge.wants_token_ids})
    return judge


_JUDGEMENTS = [
    {
        "rewards": [0.95, 0.05],
        "scores": {"quality": [1.0, 0.0], "safety": [0.9, 0.1]},
        "reasoning": "A names the right span of time. B only repeats a word.\nVerdict: A",
        "num_calls": 15,
        "num_failures": 0,
        "fingerprint": "0f3a9c1e5b7d2468",
    },
    {"reason": "unreadable_verdict", "num_calls": 9, "num_failures": 4},
]
_EXAMPLE = {"application/json": {"example": {"judgements": _JUDGEMENTS, "wants_token_ids": False}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": _EXAMPLE},
    TokenIdsNeededError.status: {"description": "This judge needs the policy's token ids: send the request with them"},
}
