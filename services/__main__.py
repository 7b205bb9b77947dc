"""`python -m services rollout|rewriter|judge|collector --config FILE [--section.key VALUE ...]`.

Nothing heavy is imported before the arguments are parsed. Exit status: 0 after SIGTERM or SIGINT, and when the
collector has finished; 1 on an error (one JSON line); 2 on unknown arguments.
"""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from shared.http import build_server, listen, refuse_open_binding
from shared.metrics import SERVICES, EngineRole, ServiceRole
from shared.process import leave, on_stop_signal, run_process

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shared.settings import Secrets, Settings


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m services", description="One of Headwater's services.")
    parser.add_argument("role", choices=SERVICES)
    role: ServiceRole = parser.parse_args(arguments[:1]).role
    command = f"python -m services {role}"
    if role == "collector":
        _leave_at_once(run_process(role, _collect, command=command, arguments=arguments[1:]))
    return run_process(role, partial(_serve_role, role), command=command, arguments=arguments[1:])


def _collect(settings: "Settings", secrets: "Secrets") -> None:
    from services.collector.service import run

    run(settings, secrets)


def _leave_at_once(status: int) -> NoReturn:
    """A thread that still waits for a source or for Redis must not hold the process."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def _serve_role(role: EngineRole, settings: "Settings", secrets: "Secrets") -> None:
    address = getattr(settings, role)
    refuse_open_binding(address.host, secrets)
    app = import_module(f"services.{role}.app").build_app(settings, secrets)
    asyncio.run(_serve(app, role, host=address.host, port=address.port))


async def _serve(app: "FastAPI", role: EngineRole, *, host: str, port: int) -> None:
    """Until a signal comes; requests in flight are finished within SHUTDOWN_S.

    An error in the app's lifespan, or one that the app leaves in `app.state.failure`, ends the server and is raised.
    """
    app.state.failure = None
    server = build_server(app, has_failed=lambda: app.state.failure is not None)
    # The lifespan is run here, so that its errors reach `run_process` instead of uvicorn's log.
    async with app.router.lifespan_context(app):
        sockets = listen(host, port, setting=f"{role}.port")
        on_stop_signal(server.handle_exit)
        await server.serve(sockets)
        on_stop_signal(leave)
    if app.state.failure is not None:
        raise app.state.failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
