"""Tests of the engine seam with real engines. Those of vLLM are collected only if vLLM is installed: `make test-vllm`
makes an environment for CPUs and runs this folder in it."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.services.conftest import build_tiny_model
from tests.services.rollout.conftest import TOKEN
from tests.vllm.subjects import KEY_VARIABLE, Subject, openai_subject, transformers_subject, vllm_subject

HAS_VLLM = find_spec("vllm") is not None
KINDS = ["transformers", "openai", *(["vllm"] if HAS_VLLM else [])]

_SEEN: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-vllm", action="store_true", help="run the whole run on vLLM services, which takes minutes")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True: do not import it."""
    is_run = collection_path.name == "test_vllm_run.py"
    wanted = HAS_VLLM and (not is_run or config.getoption("--run-vllm", default=False))
    return None if wanted or not collection_path.name.startswith("test_vllm_") else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _SEEN:
        terminalreporter.section("seen")
    for name, value in _SEEN.items():
        terminalreporter.write_line(f"{name}: {value}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and its dependencies emit warnings when imported, which we can't fix."""
    if HAS_VLLM:
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with heads of 32 dimensions: the minimum of vLLM's CPU attention."""
    folder = tmp_path_factory.mktemp("model") / "first"
    build_tiny_model(folder, width=128)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    folder = tmp_path_factory.mktemp("model") / "other"
    build_tiny_model(folder, seed=1, width=128)
    return folder


@pytest.fixture(scope="session")
def transformers_engine(model: Path) -> Iterator[Subject]:
    with transformers_subject(model) as subject:
        yield subject


@pytest.fixture(scope="session")
def openai_engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, TOKEN)
        with openai_subject(model, tmp_path_factory.mktemp("run")) as subject:
            yield subject


@pytest.fixture(scope="session")
def vllm_engine(model: Path) -> Iterator[Subject]:
    """One engine core for all tests: it takes half a minute to start."""
    with vllm_subject(model) as subject:
        yield subject


@pytest.fixture(scope="session", params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each engine in turn."""
    found: Subject = request.getfixturevalue(f"{request.param}_engine")
    return found


@pytest.fixture(scope="session", params=[kind for kind in KINDS if kind != "openai"])
def local(request: pytest.FixtureRequest) -> Subject:
    """Each engine that gives token ids."""
    found: Subject = request.getfixturevalue(f"{request.param}_engine")
    return found


@pytest.fixture(scope="session")
def seen() -> dict[str, str]:
    """Results and measurements, shown at the end of the run."""
    return _SEEN
