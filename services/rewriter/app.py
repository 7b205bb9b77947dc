"""The rewriter as an HTTP service: POST /v1/rewrites."""

import asyncio
import logging
from typing import Annotated

from fastapi import Body, FastAPI, Request

from services.app import create_app, unless_disconnected
from services.engine.base import Engine
from services.engine.life import EngineLife, build_engine
from services.prompts import Prompt
from services.rewriter.answers import PolicyTokens
from services.rewriter.rewriter import Rewriter, load_prompt
from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import Readiness, RewriteRequest, RewriteResponse
from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)

_DESCRIPTION = """A teacher model's version of each suffix: good text is copied, bad text is repaired or made safe, and
all of it is cut to the suffix length in the policy's tokens."""


def build_app(settings: Settings, secrets: Secrets, *, engine: Engine | None = None) -> FastAPI:
    """`engine` replaces the one in the settings (tests). SettingsError for a prompt that can't be used."""
    prompt = load_prompt(settings.rewriter.prompt)
    chosen = engine or build_engine(settings.rewriter.engine)
    life = EngineLife(chosen, build=lambda: _open(settings, prompt, chosen))

    def readiness() -> Readiness:
        return Readiness(
            ready=life.ready,
            service="rewriter",
            engine=settings.rewriter.engine.kind,
            model=settings.rewriter.engine.model,
            detail=life.detail,
        )

    app = create_app(
        service="rewriter",
        title="Headwater rewriter",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=readiness,
        summary=lambda: life.summary,
        max_request_bytes=settings.rewriter.max_request_bytes,
        lifespan=life.lifespan,
    )

    @app.post("/v1/rewrites", response_model=RewriteResponse, responses={200: {"content": _EXAMPLE}})
    async def rewrites(body: Annotated[RewriteRequest, Body()], request: Request) -> RewriteResponse:
        """Rewrite the suffix of each item. `refusal` says why an item has no rewrite; an engine that fails is a 503
        for the whole request."""
        return await unless_disconnected(request, life.service.rewrite(body))

    return app


async def _open(settings: Settings, prompt: Prompt, engine: Engine) -> Rewriter:
    """The rewriter on its started engine."""
    source = settings.policy.tokenizer_source
    tokens = await asyncio.to_thread(lambda: PolicyTokens(TokenCodec(load_tokenizer(source, setting="policy.model"))))
    rewriter = Rewriter(engine, settings=settings.rewriter, prompt=prompt, tokens=tokens)
    _log.info("rewriter ready", extra={"engine": engine.name, "policy_tokenizer": source})
    return rewriter


_REWRITES = [
    {"text": " orbits Earth.", "token_ids": [37015, 3668, 13], "finish_reason": "stop", "refusal": ""},
    {"text": "", "token_ids": [], "finish_reason": "stop", "refusal": "refused"},
]
_EXAMPLE = {"application/json": {"example": {"rewrites": [[rewrite] for rewrite in _REWRITES]}}}
