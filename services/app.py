"""What every service's HTTP side shares: health, readiness, metrics, tokens, size bound, one form of errors.

Each service's app.py calls `create_app` and adds its routes. Every route but `/healthz` and `/readyz` needs the bearer
token, the documentation (`/docs`, `/openapi.json`) included. The open ones name no address and repeat no error.
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
from starlette.exceptions import HTTPException
from starlette.routing import Route

from services.middleware import MetricsMiddleware, SizeMiddleware
from shared.api import Readiness
from shared.errors import HeadwaterError, RequestError
from shared.http import (
    METRICS_PATH,
    OPEN_PATHS,
    AuthMiddleware,
    MetricsRoute,
    error_response,
    on_http_error,
    readiness_response,
    render_error,
)
from shared.metrics import ServiceRole
from shared.settings import Secrets

_log = logging.getLogger(__name__)

T = TypeVar("T")
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    *,
    service: ServiceRole,
    title: str,
    description: str,
    secrets: Secrets,
    readiness: Callable[[], Readiness],
    summary: Callable[[], str] = lambda: "",
    max_request_bytes: int,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """An app with everything but the service's own routes.

    `readiness` has its detail in full, for callers with the token; `summary` is what everybody may read instead. Both
    must answer without I/O.
    """
    app = FastAPI(title=title, description=description, lifespan=lifespan, redoc_url=None)
    _add_operations_routes(app, readiness, summary)
    app.routes.append(Route(METRICS_PATH, MetricsRoute(service, readiness), methods=["GET"]))
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    # The last one added is the outermost: metrics see refusals too, and no body is read before the token.
    app.add_middleware(SizeMiddleware, max_bytes=max_request_bytes)
    app.add_middleware(AuthMiddleware, secrets=secrets)
    app.add_middleware(MetricsMiddleware)
    return app


def _add_operations_routes(app: FastAPI, readiness: Callable[[], Readiness], summary: Callable[[], str]) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": Readiness, "description": "Not ready: see `detail`"}}

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> dict[str, str]:
        """The process runs. Open."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], response_model=Readiness, responses=not_ready)
    async def readyz() -> Response:
        """Whether requests can be answered now, and by what; `detail` names the kind of trouble. Open."""
        return readiness_response(readiness().model_copy(update={"detail": summary()}))

    @app.get("/status", tags=["operations"], response_model=Readiness, responses=not_ready)
    async def status() -> Response:
        """The same with `detail` in full: addresses, and what stores, engines and services said."""
        return readiness_response(readiness())


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(HeadwaterError)
    async def on_headwater_error(request: Request, exc: HeadwaterError) -> Response:
        if exc.status >= 500:
            _log.warning("%s failed: %s", request.url.path, exc, extra={"error_type": type(exc).__name__})
        return render_error(exc)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_request: Request, exc: RequestValidationError) -> Response:
        return error_response("InvalidRequest", _explain(exc), status=422)

    app.add_exception_handler(HTTPException, on_http_error)

    @app.exception_handler(Exception)
    async def on_bug(_request: Request, exc: Exception) -> Response:
        # Starlette raises it again after this answer, so the server logs its traceback.
        return error_response("InternalError", f"{type(exc).__name__}: see the service's log", status=500)


def _explain(exc: RequestValidationError) -> str:
    """The first five mistakes, each with its place; a bad token list could hold a million."""
    errors = exc.errors()
    lines = [f"{'.'.join(str(piece) for piece in error['loc'])}: {error['msg']}" for error in errors[:5]]
    return "; ".join([*lines, f"and {len(errors) - 5} more"] if len(errors) > 5 else lines)


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
