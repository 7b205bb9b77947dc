"""The life of a process: arguments, settings and secrets, JSON logs, signals, one line for a fatal error.

    def work(settings: Settings, secrets: Secrets) -> None: ...

    sys.exit(run_process("trainer", work, command="python -m trainer"))

Nothing heavy is imported before the arguments are parsed.
"""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TextIO

from shared.errors import HeadwaterError
from shared.secret_urls import without_secrets

if TYPE_CHECKING:
    from shared.settings import Secrets, Settings

_log = logging.getLogger(__name__)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def run_process(
    role: str, work: "Callable[[Settings, Secrets], None]", *, command: str, arguments: Sequence[str] | None = None
) -> int:
    """The exit status: 0 when `work` ends or a signal comes, 1 on an error, which is one JSON line."""
    path, overrides = _parse_arguments(role, sys.argv[1:] if arguments is None else arguments, command=command)
    from shared.configuration import load_secrets, load_settings

    configure_logs(role)
    on_stop_signal(leave)
    try:
        work(load_settings(path, overrides), load_secrets())
    except HeadwaterError as exc:
        _log.error("%s", exc, extra={"error_type": type(exc).__name__})
        return 1
    return 0


def _parse_arguments(role: str, arguments: Sequence[str], *, command: str) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(
        prog=command,
        description=f"Headwater's {role}. Settings: TOML file < HEADWATER_SECTION__KEY < --section.key VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the run's settings")
    parsed, overrides = parser.parse_known_args(list(arguments))
    return parsed.config, overrides


def on_stop_signal(react: Callable[..., object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, react)


def leave(*_signal: object) -> NoReturn:
    """End the process with status 0: what a signal does while there is nothing to finish."""
    raise SystemExit(0)


def configure_logs(role: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Every logger's records and uncaught exceptions as JSON to `stream` (standard error by default)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonFormatter(role))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "uvicorn.access", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda found: _log_uncaught(found.exc_type, found.exc_value, found.exc_traceback)


def _log_uncaught(kind: type[BaseException], exc: BaseException | None, traceback: TracebackType | None) -> None:
    if exc is None or not isinstance(exc, Exception):
        sys.__excepthook__(kind, exc or kind(), traceback)
        return
    logging.getLogger("uncaught").critical("%s: %s", kind.__name__, exc, exc_info=(kind, exc, traceback))


class _JsonFormatter(logging.Formatter):
    """Time, level, role, logger, message, what was passed as `extra=`, and the traceback. URLs lose their secrets."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(entry, default=str))
