"""What docker-compose.yml and its overlays promise, read from the files; tests/compose tries it for real."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "docker-compose.yml", *sorted((ROOT / "compose").glob("*.yml"))]
SECRETS = ("HEADWATER_TOKEN", "REDIS_PASSWORD", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD")


class _Loader(yaml.SafeLoader):
    """Knows compose's own tags."""


_Loader.add_constructor("!reset", lambda loader, node: None)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return content


def _whole_services() -> dict[str, dict[str, Any]]:
    """Those that a file defines, not those that an overlay changes."""
    found: dict[str, dict[str, Any]] = {}
    for path in FILES:
        found |= {name: one for name, one in _read(path)["services"].items() if "restart" in one}
    return found


@pytest.mark.parametrize("name", sorted(_whole_services()))
def test_every_service_is_locked_down_and_its_image_has_a_version(name: str) -> None:
    service = _whole_services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert "privileged" not in service
    assert "cap_add" not in service
    tag = service["image"].removeprefix("${STACK_IMAGE:-").removesuffix("}").rpartition(":")[2]
    assert re.fullmatch(r"cpu|v?\d+(\.\d+)*(-[a-z]+)?", tag), service["image"]


def test_ports_are_published_on_loopback_only() -> None:
    published = {name: service["ports"] for name, service in _whole_services().items() if service.get("ports")}
    assert published.keys() == {"rollout", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_secret_has_a_default(path: Path) -> None:
    for name, rest in re.findall(r"\$\{([A-Z_]+)([^}]*)\}", path.read_text(encoding="utf-8")):
        if name in SECRETS:
            assert rest.startswith(":?"), f"{name}{rest}"
            assert "make env" in rest


def test_every_variable_is_described() -> None:
    described = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    for path in FILES:
        for name in set(re.findall(r"\$\{(STACK_[A-Z_]+)", path.read_text(encoding="utf-8"))):
            assert f"`{name}" in described or f"{name}=" in described, name
