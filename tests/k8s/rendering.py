"""What `kubectl kustomize` makes of the overlays, and how to find one's way in it."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]
ROOT = Path(__file__).parent.parent.parent
K8S = ROOT / "k8s"
OVERLAYS = sorted(file.parent.name for file in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(file.parent.name for file in K8S.glob("components/*/kustomization.yaml"))
COMPONENT = "app.kubernetes.io/component"
_RENDER_S = 60
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast


@functools.cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """The manifests of a kustomization. Skips the test where no kustomize is installed."""
    programs = {"kubectl": "kustomize", "kustomize": "build"}
    command = next(([name, verb, str(folder)] for name, verb in programs.items() if shutil.which(name)), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed: nothing can render k8s/")
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_RENDER_S, check=False)
    assert answer.returncode == 0, answer.stderr
    return tuple(found for found in yaml.load_all(answer.stdout, Loader=_LOADER) if found)


def overlay(name: str) -> tuple[Manifest, ...]:
    return render(K8S / "overlays" / name)


def with_components(folder: Path, base: str, components: Sequence[str]) -> tuple[Manifest, ...]:
    """An overlay as a user writes it into the empty `folder`: another one and components on top."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "headwater",
        "resources": [os.path.relpath(K8S / "overlays" / base, folder)],
        "components": [os.path.relpath(K8S / "components" / name, folder) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return render(folder)


def find(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one of that kind and name; generated ones by their name without the hash."""
    found = [one for one in manifests if one["kind"] == kind and _plain_name(one) == name]
    assert len(found) == 1, f"{len(found)} of {kind} {name}"
    return found[0]


def of_kind(manifests: Sequence[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in manifests if one["kind"] in kinds]


def workloads(manifests: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, pod template) of everything that makes pods."""
    for one in of_kind(manifests, "Deployment", "StatefulSet", "Job"):
        yield one["metadata"]["name"], one["spec"]["template"]


def workload(manifests: Sequence[Manifest], name: str) -> Manifest:
    """Its pod template's spec."""
    spec: Manifest = dict(workloads(manifests))[name]["spec"]
    return spec


def container(manifests: Sequence[Manifest], role: str, name: str = "") -> Manifest:
    """A container of the role, init containers included; by default the one of the role's name."""
    [found] = [one for one in all_containers(workload(manifests, role)) if one["name"] == (name or role)]
    return found


def port_of(manifests: Sequence[Manifest], role: str) -> int:
    """The first that it listens on."""
    return int(workload(manifests, role)["containers"][0]["ports"][0]["containerPort"])


def saved_config(manifests: Sequence[Manifest], name: str, folder: Path) -> Path:
    """A ConfigMap's run.toml, written to `folder`."""
    file = folder / f"{name}.toml"
    file.write_text(find(manifests, "ConfigMap", name)["data"]["run.toml"], encoding="utf-8")
    return file


def all_containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def _plain_name(manifest: Manifest) -> str:
    name: str = manifest["metadata"]["name"]
    generated = manifest["kind"] == "ConfigMap" and name != "dashboards"
    return name.rpartition("-")[0] if generated else name
