"""A judge for commands that measure one: the running one at judge.url, else the service itself in this process.

    async with open_judge(settings, secrets, timeout_s=600) as judge:
        answer = await judge.ask(question.request(...))

Both answer the same requests through the service's own app and the collector's own client. Every wait is bounded.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from services.collector.answers import RefusedRequestError
from services.collector.clients import JudgeClient, MakeJudgementRequest, http_client
from services.concurrency import all_of
from shared.api import JudgementFailure, Readiness
from shared.errors import HeadwaterError
from shared.records import Judgement
from shared.settings import Secrets, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from services.engine.base import Engine

_ATTEMPTS = 6
"""Of a request, where the settings would wait for ever."""
_LOOK_S = 0.05
_IN_PROCESS = "http://judge"

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredJudge:
    client: JudgeClient
    readiness: Readiness
    """Which judge it is: model and fingerprint."""
    max_at_once: int
    """Requests, as many as the collector would send: collector.max_windows_in_flight."""

    async def ask(self, make_request: MakeJudgementRequest) -> Judgement | JudgementFailure:
        """About one chunk. A request that the judge refuses is a failure with its reason; HeadwaterError for a judge
        that is away or not ours."""
        try:
            answer = await self.client.judge(make_request, document="")
        except RefusedRequestError as exc:
            if exc.reason == "judge_unavailable":
                raise
            return JudgementFailure(reason=exc.reason, num_calls=0, num_failures=0)
        if len(answer.judgements) != 1:
            raise HeadwaterError(
                f"the judge answered {len(answer.judgements)} judgements to a question about one chunk"
            )
        return answer.judgements[0]

    async def all_of(self, questions: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Their answers in order, `max_at_once` at a time."""
        slots = asyncio.Semaphore(self.max_at_once)

        async def in_turn(question: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with slots:
                return await question()

        return await all_of(in_turn(question) for question in questions)


@asynccontextmanager
async def open_judge(
    settings: Settings, secrets: Secrets, *, timeout_s: float, engine: "Engine | None" = None
) -> AsyncIterator[MeasuredJudge]:
    """HeadwaterError if the judge is not ready within `timeout_s`. `engine` replaces that of the settings (tests)."""
    limits = settings.collector.model_copy(update={"max_attempts": settings.collector.max_attempts or _ATTEMPTS})
    async with AsyncExitStack() as stack:
        transport, urls, app = None, settings.judge.base_urls, None
        if not settings.judge.url:
            from services.judge.app import build_app  # the web framework, 0.5 s

            app = build_app(settings, secrets, engine=engine)
            app.state.failure = None
            await stack.enter_async_context(app.router.lifespan_context(app))
            transport, urls = httpx.ASGITransport(app, raise_app_exceptions=False), (_IN_PROCESS,)
        http = await stack.enter_async_context(http_client(settings, token=secrets.token, transport=transport))
        readiness = await _until_ready(http, urls[0], app, timeout_s=timeout_s)
        client = JudgeClient("judge", urls, http, limits)
        yield MeasuredJudge(client, readiness, settings.collector.max_windows_in_flight)


async def _until_ready(http: httpx.AsyncClient, url: str, app: "FastAPI | None", *, timeout_s: float) -> Readiness:
    deadline, found = time.monotonic() + timeout_s, "no answer yet"
    while True:
        try:
            answer = await http.get(f"{url}/readyz")
            if answer.status_code == httpx.codes.OK:
                return Readiness.model_validate_json(answer.content)
            found = answer.text[:200]
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            found = f"{type(exc).__name__}: {exc}"
        except ValueError as exc:
            raise HeadwaterError(f"{url}/readyz is not that of a judge of this version: {exc}") from exc
        failure: HeadwaterError | None = app.state.failure if app else None
        if failure is not None:
            raise failure
        if time.monotonic() > deadline:
            raise HeadwaterError(f"the judge at {url} is not ready after {timeout_s:g} s (--timeout): {found}")
        await asyncio.sleep(_LOOK_S)
