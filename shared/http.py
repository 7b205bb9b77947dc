"""HTTP as every process speaks it: the bearer token, one form of errors, the operations routes, one server.

`/healthz` and `/readyz` are open; every other route needs the token. The web framework is loaded at the first call.

    with serving_metrics("trainer", host, port, secrets):  # /healthz and /metrics from a thread
        train()
"""

import hmac
import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any

from shared.errors import AuthError, HeadwaterError, SettingsError
from shared.secret_urls import without_secrets

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from shared.api import Readiness
    from shared.metrics import Role
    from shared.settings import Secrets

_log = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz", "/readyz")
METRICS_PATH = "/metrics"
OPERATIONS_PATHS = (*OPEN_PATHS, "/status", METRICS_PATH)
RETRY_AFTER_S = 1
"""A batch takes about a second; callers back off further by themselves."""
SHUTDOWN_S = 10
"""Requests in flight get this long after SIGTERM."""
_STOP_S = 5.0
_NAMES = {400: "BadRequest", 404: "NotFound", 405: "MethodNotAllowed", 413: "RequestTooLargeError"}


def generate_token() -> str:
    return secrets.token_urlsafe(32)


def authorization_header(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def check_bearer(header: str | None, *, token: str) -> None:
    """Raise AuthError unless `header` is `Bearer <token>`. An empty `token` accepts everybody."""
    if not token:
        return
    scheme, _, given = (header or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.encode()):
        raise AuthError("missing or wrong bearer token: send 'Authorization: Bearer <HEADWATER_TOKEN>'")


def refuse_open_binding(host: str, secrets_: "Secrets") -> None:
    """Raise SettingsError if a server would listen beyond loopback without a token."""
    if not (_is_loopback(host) or secrets_.token):
        raise SettingsError(f"binding to {host} without a token would let anybody in: set HEADWATER_TOKEN")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AuthMiddleware:
    """Refuses before any of the body is read."""

    def __init__(self, app: "ASGIApp", *, secrets: "Secrets") -> None:
        self._app = app
        self._secrets = secrets

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                check_bearer(header_of(scope, b"authorization"), token=self._secrets.token)
            except AuthError as exc:
                await render_error(exc)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def header_of(scope: "Scope", name: bytes) -> str | None:
    headers: Any = scope["headers"]
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def error_response(kind: str, message: str, *, status: int, headers: Mapping[str, str] | None = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse({"error": {"type": kind, "message": message}}, status_code=status, headers=headers)


def render_error(exc: HeadwaterError) -> "Response":
    headers = {"Retry-After": str(RETRY_AFTER_S)} if exc.status == 503 else {}
    if isinstance(exc, AuthError):
        headers = {"WWW-Authenticate": "Bearer"}
    return error_response(type(exc).__name__, str(exc), status=exc.status, headers=headers)


async def on_http_error(_request: "Request", exc: Any) -> "Response":
    return error_response(_NAMES.get(exc.status_code, "HttpError"), str(exc.detail), status=exc.status_code)


def readiness_response(found: "Readiness") -> "Response":
    """200 or 503, and the gauge `headwater_ready` with it."""
    from starlette.responses import Response

    from shared import metrics

    metrics.ready.set(found.ready)
    content = without_secrets(found.model_dump_json())  # a model may be named by a URL, too
    return Response(content, status_code=200 if found.ready else 503, media_type="application/json")


class MetricsRoute:
    """prometheus_client's own app with the metrics of one role, as plain text whatever form is asked for."""

    def __init__(self, role: "Role", readiness: "Callable[[], Readiness] | None" = None) -> None:
        from prometheus_client import make_asgi_app

        from shared import metrics

        self._app = make_asgi_app(metrics.registry_of(role))
        self._ready = metrics.ready
        self._readiness = readiness

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if self._readiness:
            self._ready.set(self._readiness().ready)
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept"]
        await self._app({**scope, "headers": headers}, receive, send)


def operations_app(
    role: "Role",
    *,
    secrets: "Secrets",
    readiness: "Callable[[], Readiness] | None" = None,
    summary: Callable[[], str] = lambda: "",
) -> "ASGIApp":
    """For a process that serves no requests of work. Without `readiness` only /healthz and /metrics.

    `summary` takes the place of the readiness's detail for callers without the token. Both must answer without I/O.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def healthz(_request: "Request") -> "Response":
        return JSONResponse({"status": "ok"})

    routes = [Route("/healthz", healthz), Route(METRICS_PATH, MetricsRoute(role, readiness), methods=["GET"])]
    if readiness is not None:

        async def readyz(_request: "Request") -> "Response":
            return readiness_response(readiness().model_copy(update={"detail": summary()}))

        async def status(_request: "Request") -> "Response":
            return readiness_response(readiness())

        routes += [Route("/readyz", readyz), Route("/status", status)]
    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_error})
    app.add_middleware(AuthMiddleware, secrets=secrets)
    return app


def listen(host: str, port: int, *, setting: str) -> list[socket.socket]:
    """Sockets for every address of `host`. SettingsError, which names `setting`, if the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
        sockets = [socket.create_server(address, family=family) for family, address in addresses]
    except OSError as exc:
        raise SettingsError(f"{setting}: can't listen on {host}:{port}: {exc}; choose another port") from exc
    _log.info("listening on http://%s:%d", host, port)
    return sockets


def build_server(app: "ASGIApp", *, has_failed: Callable[[], bool] = lambda: False) -> "uvicorn.Server":
    """A server without a lifespan. It leaves signals to its caller, and ends once `has_failed()`."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # uvicorn would raise the signal again after a calm stop: exit status -15 instead of 0

        async def on_tick(self, counter: int) -> bool:
            return has_failed() or await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return Server(config)


@contextmanager
def serving_metrics(role: "Role", host: str, port: int, secrets_: "Secrets") -> Iterator[int | None]:
    """Serve /healthz and /metrics from a thread; yields the port, None where `port` is 0 (nothing is served). Raises
    SettingsError if the port is taken, or would be open to anybody without a token."""
    if not port:
        yield None
        return
    refuse_open_binding(host, secrets_)
    sockets = listen(host, port, setting=f"{role}.metrics_port")
    server = build_server(operations_app(role, secrets=secrets_))
    thread = Thread(target=server.run, args=(sockets,), name="metrics", daemon=True)
    thread.start()
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(_STOP_S)
