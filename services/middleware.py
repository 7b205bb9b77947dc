"""Pure-ASGI middleware of the services: request metrics and the size bound. The token's is in shared/http.py."""

import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import metrics
from shared.errors import RequestTooLargeError
from shared.http import OPERATIONS_PATHS, header_of, render_error


class MetricsMiddleware:
    """Counts requests by route template and status, their seconds, and those of work that are in flight."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        is_work = scope["path"] not in OPERATIONS_PATHS
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
            path = scope["path"]
            # The template, with its placeholders: labels stay few whatever is asked for.
            route = path if path in OPERATIONS_PATHS else str(getattr(scope.get("route"), "path", "unmatched"))
            metrics.requests_total.labels(route, str(status)).inc()
            metrics.request_seconds.labels(route).observe(time.perf_counter() - started)


class SizeMiddleware:
    """Answers 413 for bodies above `max_bytes`: by their declared length at once, otherwise while they arrive."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = header_of(scope, b"content-length")
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
