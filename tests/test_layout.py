"""The line that holds the tree together: imports go downwards only, and light parts stay light."""

import ast
import re
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
    "starter/recipe": {"shared", "services", "trainer", "starter"},
    "cli": {"shared", "services", "trainer", "evaluation", "starter", "cli"},
}
MAX_LINES = 400
SHORT_LINES, MAX_SHORT_SHARE = 60, 0.1
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
    inner = {ROOT / name for name in ALLOWED if name.startswith(f"{package}/")}
    paths = sorted(path for path in (ROOT / package).rglob("*.py") if inner.isdisjoint(path.parents))
    assert paths, f"{package} has no modules"
    for path in paths:
        upwards = (_imports(path) & ALLOWED.keys()) - ALLOWED[package]
        assert not upwards, f"{path.relative_to(ROOT)} imports {sorted(upwards)}"


SHARED = "\n".join(f"import shared.{path.stem}" for path in (ROOT / "shared").glob("[!_]*.py"))
TOKENIZER = f"""
import services.collector.service
from services.collector.windows import PolicyTokenizer
PolicyTokenizer({str(ROOT / "starter" / "models" / "policy")!r})"""
ENDPOINT = """
from services.{role}.app import build_app
from shared.settings import Secrets, Settings
engine = {{"kind": "openai", "model": "m", "endpoint": "http://127.0.0.1:9"}}
build_app(Settings.model_validate({{"{role}": {{"engine": engine}}}}), Secrets())"""


@pytest.mark.parametrize(
    ("statements", "heavy"),
    [
        (SHARED, {"torch", "vllm", "fastapi", "transformers"}),
        ("import cli.run, cli.audit, cli.check, cli.report", {"torch", "transformers", "fastapi"}),
        ("import services.__main__, services.collector.service", {"fastapi"}),
        (TOKENIZER, {"torch", "transformers"}),
        (ENDPOINT.format(role="rewriter"), {"torch", "transformers"}),
        (ENDPOINT.format(role="judge"), {"torch", "transformers"}),
    ],
    ids=["shared", "launcher", "collector", "tokenizer", "rewriter", "judge"],
)
def test_light_parts_load_nothing_heavy(statements: str, heavy: set[str]) -> None:
    program = f"import sys\n{statements}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert not set(answer.stdout.split()) & heavy


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


def _names(path: Path) -> set[str]:
    """Everything that a module defines, methods as `Class.method`."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_every_name_in_the_architecture_page_exists() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py):([\w.]+)`", page)
    assert len(named) > 20
    gone = [f"{file}:{name}" for file, name in named if name not in _names(ROOT / file)]
    assert not gone


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"])
def test_files_named_in_a_page_exist(page: str) -> None:
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|md|toml)|(?:[\w]+/)+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_no_source_file_is_too_long_and_few_are_short() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" and path.parent.name != "versions"  # a migration is as long as its change
    }
    assert not [name for name, number in lines.items() if number > MAX_LINES and name != "shared/settings.py"]
    short = [name for name, number in lines.items() if number < SHORT_LINES]
    assert len(short) < MAX_SHORT_SHARE * len(lines), short
