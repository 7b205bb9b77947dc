"""Left out of every collection unless asked for: `make test-compose`. They need a container engine, and minutes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.stack import Stack

_FIGURES: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-compose", action="store_true", help="run the tests of the compose stack")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True: not even looked at."""
    return None if config.getoption("--run-compose", default=False) else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _FIGURES:
        terminalreporter.section("compose stack, measured")
    for name, value in _FIGURES.items():
        terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    """What was measured; shown at the end."""
    return _FIGURES


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, figures: dict[str, str]) -> Iterator[Stack]:
    """The shipped compose file in a project of its own: built, up and ready. Everything of it is removed in the end."""
    stack = Stack(tmp_path_factory.mktemp("compose"))
    try:
        figures["build, with what was cached"] = f"{stack.timed('build'):.0f} s"
        figures["image"] = f"{stack.image_bytes() / 1e6:,.0f} MB"
        figures["up --wait, from nothing to ready"] = f"{stack.timed('up', '--detach', '--wait'):.0f} s"
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans")
