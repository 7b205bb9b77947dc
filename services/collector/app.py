"""The collector's HTTP side: health, readiness and metrics. Nobody sends it requests of work."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import uvicorn
from fastapi import FastAPI

from services.app import create_app
from shared.api import Readiness
from shared.settings import Secrets

_MAX_REQUEST_BYTES = 65_536
_DESCRIPTION = "Reads documents, has their chunks continued, rewritten and judged, and writes them on the stream."


def build(secrets: Secrets, trouble: Callable[[], Mapping[str, str]]) -> FastAPI:
    """`trouble()` says at once what keeps the collector from its work: in a few words, each with the whole sentence."""

    def readiness() -> Readiness:
        found = trouble()
        return Readiness(ready=not found, service="collector", detail="; ".join(found.values()))

    return create_app(
        service="collector",
        title="Headwater collector",
        description=_DESCRIPTION,
        secrets=secrets,
        readiness=readiness,
        summary=lambda: "; ".join(trouble()),
        max_request_bytes=_MAX_REQUEST_BYTES,
    )


class HealthServer(uvicorn.Server):
    """Serves beside the work and leaves signals to it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def health_server(app: FastAPI, *, host: str, port: int) -> HealthServer:
    config = uvicorn.Config(
        app, host=host, port=port, lifespan="off", log_config=None, access_log=False, server_header=False
    )
    return HealthServer(config)
