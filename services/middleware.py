"""Pure-ASGI middleware of every service: request metrics, bearer token, size bound. Assembled by services/app.py."""

import time
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import metrics
from shared.errors import AuthError, HeadwaterError, RequestTooLargeError
from shared.http import check_bearer
from shared.settings import Secrets

RETRY_AFTER_S = 1
"""A batch takes about a second; callers back off further by themselves."""


def error_response(kind: str, message: str, *, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        {"error": {"type": kind, "message": message}}, status_code=status, headers=dict(headers) if headers else None
    )


def render_error(exc: HeadwaterError) -> JSONResponse:
    """Its class name as type, its text as message, its own status."""
    return error_response(type(exc).__name__, str(exc), status=exc.status, headers=_headers(exc))


def _headers(exc: HeadwaterError) -> dict[str, str]:
    if exc.status == 503:
        return {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(exc, AuthError):
        return {"WWW-Authenticate": "Bearer"}
    return {}


OPEN_PATHS = ("/healthz", "/readyz")
METRICS_PATH = "/metrics"
_OPERATIONS_PATHS = (*OPEN_PATHS, "/status", METRICS_PATH)


class MetricsMiddleware:
    """Counts requests by route template and status, their seconds, and those of work that are in flight."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        is_work = scope["path"] not in _OPERATIONS_PATHS
        metrics.requests_in_flight.inc(is_work)
        started = time.perf_counter()

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting_status)
        finally:
            metrics.requests_in_flight.dec(is_work)
            route = _template(scope)
            metrics.requests_total.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.perf_counter() - started)


class AuthMiddleware:
    """Refuses everything but the open paths without a token, before any of the body is read."""

    def __init__(self, app: ASGIApp, *, secrets: Secrets) -> None:
        self._app = app
        self._secrets = secrets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                check_bearer(_header(scope, b"authorization"), token=self._secrets.token)
            except AuthError as exc:
                await render_error(exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SizeMiddleware:
    """Answers 413 for bodies above `max_bytes`: by their declared length at once, otherwise while they arrive."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _header(scope, b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > self._max_bytes:
            await render_error(RequestTooLargeError(self._message(int(declared))))(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def receive_counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # The one exception that FastAPI lets through while it reads a body.
                raise HTTPException(413, self._message(received))
            return message

        return receive_counting

    def _message(self, num_bytes: int) -> str:
        return f"the request has {num_bytes} bytes or more, at most {self._max_bytes} are accepted: send fewer items"


def _header(scope: Scope, name: bytes) -> str | None:
    headers: Any = scope["headers"]
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def _template(scope: Scope) -> str:
    """The route's path with its placeholders, so that labels stay few whatever is asked for."""
    return str(getattr(scope.get("route"), "path", "unmatched"))
