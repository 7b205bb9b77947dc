"""JSON logs, one object a line, configured once in each process's `main`."""

import json
import logging
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from shared.secret_urls import without_secrets

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time, level, process role, logger, message, whatever was passed as `extra=`, and the traceback. URLs lose their
    secrets, whoever wrote them."""

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


def configure_logs(role: str, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Send every logger's records as JSON to `stream` (standard error by default), and with them the exceptions that
    nobody catches."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(role))
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
