"""One JSON object a line."""

import io
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from shared.process import configure_logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, threading.excepthook
    stream = io.StringIO()
    configure_logs("judge", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.excepthook, threading.excepthook = hooks


def test_a_line_has_role_level_time_and_extras(stream: io.StringIO) -> None:
    logging.getLogger("a.b").warning("lost %d", 3, extra={"window_id": "0.0.1.0"})
    entry = json.loads(stream.getvalue())
    assert (entry["role"], entry["level"], entry["logger"], entry["message"]) == ("judge", "warning", "a.b", "lost 3")
    assert entry["window_id"] == "0.0.1.0"
    assert entry["time"].endswith("Z")


def test_a_traceback_stays_on_its_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        logging.getLogger("a").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["traceback"]


def test_what_json_cannot_hold_is_written_as_text(stream: io.StringIO) -> None:
    logging.getLogger("a").info("x", extra={"place": object})
    assert json.loads(stream.getvalue())["place"] == "<class 'object'>"


def test_chatty_libraries_are_quiet(stream: io.StringIO) -> None:
    logging.getLogger("httpx").info("GET /")
    assert stream.getvalue() == ""


def test_urls_have_no_secrets_in_messages_extras_and_tracebacks(stream: io.StringIO) -> None:
    url = "redis://:hUsh@redis/0?password=hUsh"
    try:
        try:
            raise OSError(f"no answer from {url}")
        except OSError as exc:
            raise ValueError(url) from exc
    except ValueError:
        logging.getLogger("redis").exception("%s is away", url, extra={"places": [url], "client": {"url": url}})
    entry = json.loads(stream.getvalue())
    assert "hUsh" not in stream.getvalue()
    assert (entry["message"], entry["places"]) == ("redis://redis/0 is away", ["redis://redis/0"])
    assert entry["traceback"].count("redis://redis/0") == 2


THREAD = "import threading; thread = threading.Thread(target=fail); thread.start(); thread.join()"


@pytest.mark.parametrize(("call", "status"), [("fail()", 1), (THREAD, 0)])
def test_what_nobody_catches_is_a_line_too(call: str, status: int) -> None:
    code = f"""
from shared.process import configure_logs
def fail():
    raise ValueError("no port in 'redis://:hUsh@redis:x/0'")
configure_logs("judge")
{call}
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    entry = json.loads(ended.stderr)
    assert ended.returncode == status
    assert (entry["role"], entry["message"]) == ("judge", "ValueError: no port in 'redis://'")
    assert "in fail" in entry["traceback"]
    assert "hUsh" not in ended.stderr
