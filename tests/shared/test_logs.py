"""One JSON object a line."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from shared.logs import configure_logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("judge", stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_has_role_level_time_and_extras(stream: io.StringIO) -> None:
    logging.getLogger("a.b").warning("lost %d", 3, extra={"document_id": "0.0.1.0"})
    entry = json.loads(stream.getvalue())
    assert (entry["role"], entry["level"], entry["logger"], entry["message"]) == ("judge", "warning", "a.b", "lost 3")
    assert entry["document_id"] == "0.0.1.0"
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
