"""The trainer's `/metrics` and `/healthz`: threads beside the training loop, started by `python -m trainer`.

Off unless `trainer.metrics_port` is set. `/metrics` needs the bearer token, as every service's does; `/healthz` is open
and says that the process runs, not that it makes progress: that is `headwater_step`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from shared.errors import AuthError, SettingsError
from shared.http import check_bearer, refuse_open_binding
from shared.metrics import registry_of
from shared.settings import Secrets

_log = logging.getLogger(__name__)
_CLIENT_TIMEOUT_S = 10.0
_STOP_S = 5.0

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


@contextmanager
def serving_metrics(host: str, port: int, secrets: Secrets) -> Iterator[int | None]:
    """Serve meanwhile; yields the port, None where `port` is 0 and nothing is served.

    Raises SettingsError if the address can't be had, or lies open without tokens.
    """
    if not port:
        yield None
        return
    refuse_open_binding(host, secrets)
    server = _listen(host, port, secrets)
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    _log.info("metrics on http://%s:%d/metrics", host, port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_STOP_S)


class _Server(ThreadingMixIn, WSGIServer):
    """A scraper that stalls holds a thread of its own, not the others."""

    daemon_threads = True
    block_on_close = False


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """A line for every scrape would drown the log."""


def _listen(host: str, port: int, secrets: Secrets) -> WSGIServer:
    try:
        return make_server(host, port, _application(secrets), server_class=_Server, handler_class=_Handler)
    except OSError as exc:
        raise SettingsError(
            f"trainer.metrics_port: can't listen on {host}:{port}: {exc}; choose another port, or 0 for none"
        ) from exc


def _application(secrets: Secrets) -> Callable[[Environ, StartResponse], Iterable[bytes]]:
    metrics_application = make_wsgi_app(registry_of("trainer"))

    def answer(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/healthz":
            return _say(start_response, "200 OK", "ok\n")
        if path != "/metrics":
            return _say(start_response, "404 Not Found", "here are /metrics and /healthz\n")
        try:
            check_bearer(environ.get("HTTP_AUTHORIZATION"), token=secrets.token)
        except AuthError as exc:
            return _say(start_response, "401 Unauthorized", f"{exc}\n", ("WWW-Authenticate", "Bearer"))
        found: Iterable[bytes] = metrics_application(environ, start_response)
        return found

    return answer


def _say(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [text.encode()]
