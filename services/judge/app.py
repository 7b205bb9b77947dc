"""The judge as an HTTP service: POST /v1/judgements. Started by `python -m services.judge`."""

import asyncio
import logging
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request

from services.app import create_app
from services.disconnect import unless_disconnected
from services.engine.base import Engine
from services.engine.life import EngineLife, build_engine
from services.judge.building import Parts, asks_structured, build_judge, check_engine, load_parts, needs_engine
from services.judge.judging import Judge
from services.judge.likelihood import TokenReading
from services.judge.no_engine import NoEngine
from services.tokenizer import load_tokenizer, same_tokens
from shared import metrics
from shared.api import JudgementRequest, JudgementResponse, Readiness
from shared.errors import EngineError, TokenIdsNeededError
from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)

_DESCRIPTION = """Scores the candidates of chunks by the configured criteria and combines them into one reward each.
The window is raw text; the judge is not told which candidate is the original, the rewrite or a rollout."""


def build(settings: Settings, secrets: Secrets) -> FastAPI:
    """The app with the engine of the settings, which starts with the app."""
    engine: Engine = NoEngine()
    if needs_engine(settings.judge):
        engine = build_engine(settings.judge.engine, constrains=asks_structured(settings.judge))
    return create_judge_app(settings, secrets, engine=engine)


def create_judge_app(settings: Settings, secrets: Secrets, *, engine: Engine) -> FastAPI:
    """Raises SettingsError at once for a prompt or a function that can't be used."""
    bench = Bench(settings, engine=engine, parts=load_parts(settings.judge))
    app = create_app(
        service="judge",
        title="Headwater judge",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=bench.readiness,
        summary=lambda: bench.life.summary,
        max_request_bytes=settings.judge.max_request_bytes,
        lifespan=bench.life.lifespan,
    )

    @app.post("/v1/judgements", response_model=JudgementResponse, responses=_RESPONSES)
    async def judgements(body: Annotated[JudgementRequest, Body()], request: Request) -> JudgementResponse:
        """Score the candidates of each chunk. A chunk that can't be scored is a failure with its reason and its
        calls; an engine that fails is a 503 for the whole request."""
        return await unless_disconnected(request, bench.judge.judge(body))

    return app


class Bench:
    """The judge's life: none while the engine starts, then one for good."""

    def __init__(self, settings: Settings, *, engine: Engine, parts: Parts) -> None:
        self._settings = settings
        self._engine = engine
        self._parts = parts
        self._judge: Judge | None = None
        self.life = EngineLife(engine, after_start=self._open)

    @property
    def judge(self) -> Judge:
        if self._judge is None:
            raise EngineError(f"the judge can't answer yet: {self.life.detail}")
        return self._judge

    def readiness(self) -> Readiness:
        return Readiness(
            ready=self.life.ready,
            service="judge",
            engine=self._settings.judge.engine.kind if needs_engine(self._settings.judge) else "none",
            model=self._settings.judge.engine.model,
            fingerprint=self._judge.fingerprint if self._judge else "",
            detail=self.life.detail,
        )

    async def _open(self) -> None:
        check_engine(self._settings.judge, self._engine)
        reading = None
        if "likelihood" in self._settings.judge.criteria:
            reading = await asyncio.to_thread(token_reading, self._settings)
        self._judge = build_judge(self._settings.judge, self._parts, engine=self._engine, reading=reading)
        metrics.judge_info.labels(self._judge.fingerprint).set(1)
        _log.info(
            "judge ready",
            extra={
                "fingerprint": self._judge.fingerprint,
                "engine": self._engine.name,
                "criteria": list(self._settings.judge.criteria),
                "scores_policy_tokens": reading.shares_policy_tokens if reading else None,
            },
        )


def token_reading(settings: Settings) -> TokenReading:
    """Whether the judge scores the policy's token ids, or texts. It scores texts if the tokenizers differ, if no policy
    is named, and at an endpoint, which tokenizes texts itself and adds its own BOS."""
    if settings.judge.engine.kind == "openai":
        return TokenReading(shares_policy_tokens=False, beginning=None)
    judge = load_tokenizer(settings.judge.engine.model, setting="judge.engine.model")
    source = settings.policy.tokenizer_source
    shared = bool(source) and same_tokens(judge, load_tokenizer(source, setting="policy.tokenizer"))
    return TokenReading(shares_policy_tokens=shared, beginning=judge.beginning)


_EXAMPLE = {
    "application/json": {
        "example": {
            "judgements": [
                {
                    "rewards": [0.95, 0.05],
                    "scores": {"quality": [1.0, 0.0], "safety": [0.9, 0.1]},
                    "reasoning": "A names the right span of time. B only repeats a word.\nVerdict: A",
                    "num_calls": 15,
                    "num_failures": 0,
                    "fingerprint": "0f3a9c1e5b7d2468",
                },
                {"reason": "unreadable_verdict", "num_calls": 9, "num_failures": 4},
            ],
            "wants_token_ids": False,
        }
    }
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": _EXAMPLE},
    TokenIdsNeededError.status: {"description": "This judge wants the policy's token ids: send the request with them"},
}
