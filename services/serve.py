"""The life of a process: arguments, logs, settings, a server that stops calmly, one line for a fatal error.

`run_service` is the whole `main` of rollout, rewriter and judge; `run_process` that of a process that brings its own
loop. Both return the exit status. Nothing heavy is imported before the arguments are parsed.
"""

import argparse
import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from shared.errors import HeadwaterError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)

SHUTDOWN_S = 10
"""Requests in flight get this long after SIGTERM."""

ServiceRole = Literal["rollout", "rewriter", "judge"]


def run_service(
    role: ServiceRole, build: "Callable[[Settings, Secrets], FastAPI]", arguments: Sequence[str] | None = None
) -> int:
    """Parse arguments, build the app, serve it at `settings.<role>.host:port` until SIGTERM."""

    def work(settings: "Settings", secrets: "Secrets") -> None:
        from shared.http import refuse_open_binding

        address = getattr(settings, role)
        refuse_open_binding(address.host, secrets)
        serve(build(settings, secrets), host=address.host, port=address.port)

    return run_process(role, work, arguments)


def run_process(role: str, work: "Callable[[Settings, Secrets], None]", arguments: Sequence[str] | None = None) -> int:
    """Parse arguments, load settings, do `work`. 0 when it ends or on SIGTERM, 1 on an error (one JSON line)."""
    path, overrides = parse_arguments(role, sys.argv[1:] if arguments is None else arguments)
    from shared.configuration import load_secrets, load_settings
    from shared.process import configure_logs

    configure_logs(role)
    _stop_calmly_on_signals()
    try:
        work(load_settings(path, overrides), load_secrets())
    except HeadwaterError as exc:
        _log.error("%s", exc, extra={"error_type": type(exc).__name__})
        return 1
    return 0


def parse_arguments(role: str, arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The configuration file and the `--section.key VALUE` words, which load_settings checks."""
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{role}" if role != "trainer" else "python -m trainer",
        description=f"Headwater's {role}. Settings: TOML file < HEADWATER_SECTION__KEY < --section.key VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the run's settings")
    parsed, overrides = parser.parse_known_args(list(arguments))
    return parsed.config, overrides


def serve(app: "FastAPI", *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT; requests in flight are finished within SHUTDOWN_S.

    An error in the app's lifespan, or one that the app leaves in `app.state.failure`, ends the server and is raised.
    """
    asyncio.run(_serve(app, host=host, port=port))


async def _serve(app: "FastAPI", *, host: str, port: int) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends on a failure of the app too, and leaves the exit status to `run_process`."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn raises the signal again after a calm stop, which would turn exit status 0 into -15.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            previous = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

        async def on_tick(self, counter: int) -> bool:
            return _failure(app) is not None or await super().on_tick(counter)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    # The lifespan is run here, so that its errors reach `run_process` instead of uvicorn's log.
    async with app.router.lifespan_context(app):
        await Server(config).serve()
    failure = _failure(app)
    if failure is not None:
        raise failure


def _failure(app: "FastAPI") -> BaseException | None:
    found: BaseException | None = getattr(app.state, "failure", None)
    return found


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _stop_calmly_on_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _exit)


def _exit(_number: int, _frame: Any) -> NoReturn:
    raise SystemExit(0)
