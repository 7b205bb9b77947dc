"""The line that holds the tree together: imports go downwards only, and light parts stay light."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.configuration import load_settings

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "shared": {"shared"},
    "services": {"shared", "services"},
    "trainer": {"shared", "trainer"},
    "evaluation": {"shared", "evaluation"},
    "starter": {"shared", "starter"},
    "cli": {"shared", "services", "trainer", "evaluation", "starter", "cli"},
}
HELP_S = 5.0
"""0.1 s on an idle machine; torch alone takes longer than this on a busy one."""


def _imports(path: Path) -> set[str]:
    """Top-level names of all absolute imports, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_go_downwards_only(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"{package} has no modules"
    for path in paths:
        upwards = (_imports(path) & ALLOWED.keys()) - ALLOWED[package]
        assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


def _loaded_after(statements: str) -> set[str]:
    program = f"import sys\n{statements}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(answer.stdout.split())


def test_shared_loads_no_torch_vllm_or_fastapi() -> None:
    modules = sorted(path.stem for path in (ROOT / "shared").glob("*.py"))
    loaded = _loaded_after("\n".join(f"import shared.{name}" for name in modules if name != "__init__"))
    assert not loaded & {"torch", "vllm", "fastapi", "transformers"}


def test_the_launcher_loads_no_torch() -> None:
    assert not _loaded_after("import cli.run, cli.audit, cli.summary") & {"torch", "transformers", "fastapi"}


def test_a_collector_loads_a_tokenizer_without_torch() -> None:
    loaded = _loaded_after(
        f"""
import services.collector.service
from services.collector.texts import PolicyTokenizer
PolicyTokenizer({str(ROOT / "starter" / "models" / "policy")!r})"""
    )
    assert not loaded & {"torch", "transformers"}


@pytest.mark.parametrize("role", ["rewriter", "judge"])
def test_a_service_with_an_endpoint_loads_no_torch(role: str) -> None:
    loaded = _loaded_after(
        f"""
from services.{role}.app import build
from shared.settings import Secrets, Settings
engine = {{"kind": "openai", "model": "m", "endpoint": "http://127.0.0.1:9"}}
build(Settings.model_validate({{"{role}": {{"engine": engine}}}}), Secrets())"""
    )
    assert not loaded & {"torch", "transformers"}


def test_help_is_quick() -> None:
    began = time.monotonic()
    answer = subprocess.run(
        [sys.executable, "-m", "cli.main", "--help"], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert time.monotonic() - began < HELP_S
    assert all(command in answer.stdout for command in ("run", "check", "init-model", "audit", "report"))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_loads(path: Path) -> None:
    load_settings(path, environ={})


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
