"""The rewriter as an HTTP service: POST /v1/rewrites. Started by `python -m services.rewriter`."""

import asyncio
import logging
from typing import Annotated

from fastapi import Body, FastAPI, Request

from services.app import create_app
from services.disconnect import unless_disconnected
from services.engine.base import Engine
from services.engine.life import EngineLife, build_engine
from services.prompts import Prompt
from services.rewriter.cutting import PolicyTokens
from services.rewriter.rewriting import Rewriter, load_prompt
from services.tokenizer import TokenCodec, load_tokenizer
from shared.api import Readiness, RewriteRequest, RewriteResponse
from shared.errors import EngineError
from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)

_DESCRIPTION = """A teacher model's version of each suffix: the same where it is good, repaired or made safe where it
is not, cut to the suffix length in the policy's tokens."""


def build(settings: Settings, secrets: Secrets) -> FastAPI:
    """The app with the engine of the settings, which starts with the app."""
    engine = build_engine(settings.rewriter.engine)
    return create_rewriter_app(settings, secrets, engine=engine)


def create_rewriter_app(settings: Settings, secrets: Secrets, *, engine: Engine) -> FastAPI:
    """Raises SettingsError at once for a prompt that can't be used."""
    desk = Desk(settings, engine=engine, prompt=load_prompt(settings.rewriter.prompt))
    app = create_app(
        service="rewriter",
        title="Headwater rewriter",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=desk.readiness,
        summary=lambda: desk.life.summary,
        max_request_bytes=settings.rewriter.max_request_bytes,
        lifespan=desk.life.lifespan,
    )

    @app.post("/v1/rewrites", response_model=RewriteResponse, responses={200: {"content": _EXAMPLE}})
    async def rewrites(body: Annotated[RewriteRequest, Body()], request: Request) -> RewriteResponse:
        """Rewrite the suffix of each item. `refusal` says why an item has no rewrite; an engine that fails is a 503
        for the whole request."""
        return await unless_disconnected(request, desk.rewriter.rewrite(body))

    return app


class Desk:
    """The rewriter's life: none while the engine starts, then one for good."""

    def __init__(self, settings: Settings, *, engine: Engine, prompt: Prompt) -> None:
        self._settings = settings
        self._engine = engine
        self._prompt = prompt
        self._rewriter: Rewriter | None = None
        self.life = EngineLife(engine, after_start=self._open)

    @property
    def rewriter(self) -> Rewriter:
        if self._rewriter is None:
            raise EngineError(f"the rewriter can't answer yet: {self.life.detail}")
        return self._rewriter

    def readiness(self) -> Readiness:
        return Readiness(
            ready=self.life.ready,
            service="rewriter",
            engine=self._settings.rewriter.engine.kind,
            model=self._settings.rewriter.engine.model,
            detail=self.life.detail,
        )

    async def _open(self) -> None:
        source = self._settings.policy.tokenizer_source
        tokens = await asyncio.to_thread(_load_tokens, source)
        self._rewriter = Rewriter(self._engine, settings=self._settings.rewriter, prompt=self._prompt, tokens=tokens)
        _log.info("rewriter ready", extra={"engine": self._engine.name, "policy_tokenizer": source})


def _load_tokens(source: str) -> PolicyTokens:
    return PolicyTokens(TokenCodec(load_tokenizer(source, setting="policy.model")))


_EXAMPLE = {
    "application/json": {
        "example": {
            "rewrites": [
                {
                    "text": " Earth once in about 27 days.",
                    "token_ids": [4824, 1752, 287, 546, 2681, 1528, 13],
                    "finish_reason": "stop",
                    "refusal": "",
                },
                {"text": "", "token_ids": [], "finish_reason": "stop", "refusal": "refused"},
            ]
        }
    }
}
