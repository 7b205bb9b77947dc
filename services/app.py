"""What every service's HTTP side shares: health, readiness, metrics, tokens, size bound, one form of errors.

`create_app` is called by each service's own app.py, which then adds its routes. Every route but `/healthz` and
`/readyz` needs the bearer token, the documentation (`/docs`, `/openapi.json`) included. What the open ones say names
no address and repeats nobody's error.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services.middleware import (
    METRICS_PATH,
    OPEN_PATHS,
    AuthMiddleware,
    MetricsMiddleware,
    SizeMiddleware,
    error_response,
    render_error,
)
from shared import metrics
from shared.api import Readiness
from shared.errors import HeadwaterError, RequestError
from shared.secret_urls import without_secrets
from shared.settings import Secrets

_log = logging.getLogger(__name__)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    *,
    service: str,
    title: str,
    description: str,
    secrets: Secrets,
    readiness: Callable[[], Readiness],
    summary: Callable[[], str] = lambda: "",
    max_request_bytes: int,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """An app with everything but the service's own routes.

    `readiness` has its detail in full, for callers with the token; `summary` is what everybody may read in its place.
    Both must answer at once, without I/O.
    """
    app = FastAPI(title=title, description=description, lifespan=lifespan, redoc_url=None)
    app.state.service = service
    app.state.secrets = secrets
    _add_operations_routes(app, readiness, summary)
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    # The last one added is the outermost: metrics see refusals too, and no body is read before the token.
    app.add_middleware(SizeMiddleware, max_bytes=max_request_bytes)
    app.add_middleware(AuthMiddleware, secrets=secrets)
    app.add_middleware(MetricsMiddleware)
    return app


def _add_operations_routes(app: FastAPI, readiness: Callable[[], Readiness], summary: Callable[[], str]) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not ready: see `detail`"}}

    def answered(found: Readiness) -> Response:
        metrics.ready.set(found.ready)
        content = without_secrets(found.model_dump_json())  # a model may be named by a URL, too
        return Response(content, status_code=200 if found.ready else 503, media_type="application/json")

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process runs. Open."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], response_model=Readiness, responses=not_ready)
    async def readyz() -> Response:
        """Whether requests can be answered now, and by what; `detail` names the kind of trouble. Open."""
        return answered(readiness().model_copy(update={"detail": summary()}))

    @app.get("/status", tags=["operations"], response_model=Readiness, responses=not_ready)
    async def status() -> Response:
        """The same with `detail` in full: addresses, and what stores, engines and services said."""
        return answered(readiness())

    @app.get(METRICS_PATH, tags=["operations"], response_class=Response)
    async def metrics_text() -> Response:
        """Prometheus metrics as text."""
        metrics.ready.set(readiness().ready)
        return Response(generate_latest(metrics.registry_of(app.state.service)), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HeadwaterError)
    async def on_headwater_error(request: Request, exc: HeadwaterError) -> Response:
        if exc.status >= 500:
            _log.warning("%s failed: %s", request.url.path, exc, extra={"error_type": type(exc).__name__})
        return render_error(exc)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_request: Request, exc: RequestValidationError) -> Response:
        return error_response("InvalidRequest", _explain(exc), status=422)

    @app.exception_handler(HTTPException)
    async def on_http_error(_request: Request, exc: HTTPException) -> Response:
        return error_response(_NAMES.get(exc.status_code, "HttpError"), str(exc.detail), status=exc.status_code)

    @app.exception_handler(Exception)
    async def on_bug(_request: Request, exc: Exception) -> Response:
        # Starlette raises it again after this answer, so the server logs its traceback.
        return error_response("InternalError", f"{type(exc).__name__}: see the service's log", status=500)


_NAMES = {400: "BadRequest", 404: "NotFound", 405: "MethodNotAllowed", 413: "RequestTooLargeError"}


def _explain(exc: RequestValidationError, *, max_errors: int = 5) -> str:
    """The first few mistakes, each with its place; a bad token list could hold a million of them."""
    errors = exc.errors()
    lines = [f"{'.'.join(str(piece) for piece in error['loc'])}: {error['msg']}" for error in errors[:max_errors]]
    if len(errors) > max_errors:
        lines.append(f"and {len(errors) - max_errors} more")
    return "; ".join(lines)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema with the bearer scheme on all routes but the open ones."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "HEADWATER_TOKEN"}
        schema["security"] = [{"bearer": []}]
        for path in OPEN_PATHS:
            schema["paths"][path]["get"]["security"] = []
        app.openapi_schema = schema
    return app.openapi_schema


T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; it is cancelled when the caller disconnects. The body must have been read."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the caller hung up before the answer was ready")
        return task.result()
    finally:
        for left in (task, gone):
            if not left.done():
                left.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await left


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
