"""docker-compose.yml and k8s/ start the same stack: commands, ports, environment names, probes, mounts, hardening."""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from shared.metrics import ROLES, SERVICES
from shared.settings import Settings
from tests.k8s.rendering import K8S, ROOT, Manifest, container, find, overlay, workload

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
STORES = ("redis", "postgres")
OPTIONAL_SECRETS = {"models": {"HF_TOKEN"}, "endpoint": {"OPENAI_API_KEY"}}
"""Their files may be empty: k8s/secrets/kustomization.yaml says what they may hold."""


def without_default(text: str) -> str:
    """`${NAME:-value}` as its value."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("role", SERVICES)
def test_services_are_started_by_the_same_command(role: str) -> None:
    assert container(overlay("cpu"), role)["command"] == COMPOSE[role]["command"]


def test_the_trainer_is_the_same_module_under_torchrun() -> None:
    python, *module = COMPOSE["trainer"]["command"]
    command = container(overlay("cpu"), "trainer")["command"]
    assert command[:3] == [python, "-m", "torch.distributed.run"]
    assert command[command.index("-m", 3) :] == module


@pytest.mark.parametrize(("role", "step"), [("trainer", "prepare"), ("collector", "documents")])
def test_what_compose_does_once_is_an_init_container(role: str, step: str) -> None:
    assert container(overlay("cpu"), role, step)["command"] == COMPOSE[step]["command"]


@pytest.mark.parametrize(("role", "service"), [*((role, role) for role in ROLES), ("trainer", "prepare")])
def test_the_environment_has_the_same_names(role: str, service: str) -> None:
    assert variable_names(container(overlay("cpu"), role, service)) == COMPOSE[service]["environment"].keys()


def variable_names(one: Manifest) -> set[str]:
    names = {variable["name"] for variable in one.get("env", [])}
    for source in one["envFrom"]:
        run = find(overlay("cpu"), "ConfigMap", "run")["data"]
        names |= secret_names(source["secretRef"]) if "secretRef" in source else run.keys()
    return names


def secret_names(reference: Mapping[str, Any]) -> set[str]:
    if reference["name"] in OPTIONAL_SECRETS:
        assert reference["optional"] is True
        return OPTIONAL_SECRETS[reference["name"]]
    script = (K8S / "secrets" / "make.sh").read_text(encoding="utf-8")
    [content] = re.findall(rf"^write {reference['name']}\.env <<EOF\n(.*?)\nEOF$", script, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^(\w+)=", content, re.MULTILINE))


@pytest.mark.parametrize("role", ROLES)
def test_addresses_and_ports_in_the_environment_are_the_same(role: str) -> None:
    given = {one["name"]: one["value"] for one in container(overlay("cpu"), role)["env"]}
    compared = {name for name in given if name.endswith(("__HOST", "__URL", "_PORT"))}
    assert compared
    assert {name: given[name] for name in compared} == {name: COMPOSE[role]["environment"][name] for name in compared}


def test_the_run_has_the_same_name_and_weight_store() -> None:
    run = find(overlay("cpu"), "ConfigMap", "run")["data"]
    assert run == {name: without_default(COMPOSE["trainer"]["environment"][name]) for name in run}


@pytest.mark.parametrize("role", ROLES)
def test_the_same_question_is_asked_for_health(role: str) -> None:
    *command, url = COMPOSE[role]["healthcheck"]["test"]
    assert command == ["CMD", "python", "-m", "shared.probe"]
    one = container(overlay("cpu"), role)
    probe = one["livenessProbe" if role == "trainer" else "readinessProbe"]["httpGet"]
    assert (probe["path"], listening_port(one, probe["port"])) == (urlsplit(url).path, urlsplit(url).port)
    assert one["livenessProbe"]["httpGet"]["path"] == one["startupProbe"]["httpGet"]["path"] == "/healthz"


def listening_port(one: Manifest, name: str) -> int:
    [port] = [int(port["containerPort"]) for port in one["ports"] if port["name"] == name]
    return port


@pytest.mark.parametrize("role", SERVICES)
def test_services_listen_where_the_settings_say(role: str) -> None:
    port = getattr(Settings(), role).port
    assert listening_port(container(overlay("cpu"), role), "http") == port


@pytest.mark.parametrize("role", ROLES)
def test_the_same_places_are_mounted(role: str) -> None:
    mounts = container(overlay("cpu"), role)["volumeMounts"]
    found = {mount["mountPath"]: mount.get("readOnly", False) for mount in mounts}
    assert found == {**dict(map(compose_mount, COMPOSE[role]["volumes"])), "/tmp": False}


def compose_mount(volume: str | dict[str, Any]) -> tuple[str, bool]:
    """(place in the container, read-only)."""
    if isinstance(volume, dict):
        return volume["target"], volume.get("read_only", False)
    if volume.startswith("/"):
        return volume, False
    _, place, *mode = without_default(volume).rsplit(":", 2 if volume.endswith(":ro") else 1)
    return place, mode == ["ro"]


@pytest.mark.parametrize("role", [*ROLES, *STORES])
def test_both_are_hardened_and_a_stop_gets_at_least_the_time_it_gets_in_compose(role: str) -> None:
    security, compose = container(overlay("cpu"), role)["securityContext"], COMPOSE[role]
    assert compose["read_only"] == security["readOnlyRootFilesystem"] is True
    assert compose["cap_drop"] == security["capabilities"]["drop"]
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert security["allowPrivilegeEscalation"] is False
    grace_s = int(without_default(compose["stop_grace_period"]).removesuffix("s"))
    assert workload(overlay("cpu"), role)["terminationGracePeriodSeconds"] >= grace_s


@pytest.mark.parametrize("role", ROLES)
def test_a_signal_is_never_lost_on_a_starting_process(role: str) -> None:
    """Process 1 ignores signals that it has no handler for; neither way of starting makes Python process 1."""
    assert COMPOSE[role]["init"] is workload(overlay("cpu"), role)["shareProcessNamespace"] is True


@pytest.mark.parametrize("role", STORES)
def test_stores_have_the_same_image_and_probe(role: str) -> None:
    one = container(overlay("cpu"), role)
    assert one["image"] == COMPOSE[role]["image"]
    assert ["CMD", *one["readinessProbe"]["exec"]["command"]] == COMPOSE[role]["healthcheck"]["test"]


def test_redis_has_the_same_command_and_postgres_the_same_names() -> None:
    compose = [word.replace("$$", "$") for word in COMPOSE["redis"]["command"]]
    assert container(overlay("cpu"), "redis")["command"] == compose
    environment = {one["name"]: one.get("value") for one in container(overlay("cpu"), "postgres")["env"]}
    del environment["PGDATA"]  # a volume's root may hold a lost+found
    assert environment == COMPOSE["postgres"]["environment"] | {"POSTGRES_PASSWORD": None}


def test_accelerators_come_with_the_same_extras() -> None:
    services = yaml.safe_load((ROOT / "compose" / "gpu.yml").read_text(encoding="utf-8"))["services"]
    for role, service in services.items():
        if role not in ROLES:
            continue
        mounts = {mount["mountPath"] for mount in container(overlay("gpu"), role)["volumeMounts"]}
        memory = [one["emptyDir"]["sizeLimit"] for one in workload(overlay("gpu"), role)["volumes"] if is_memory(one)]
        accelerated = "nvidia.com/gpu" in container(overlay("gpu"), role)["resources"]["limits"]
        assert accelerated == ("deploy" in service) == ("/headwater/cache" in mounts), role
        assert memory == [f"{service['shm_size'].removesuffix('g')}Gi" for _ in memory], role
        assert len(memory) == accelerated, role
        assert {place for _, place in (volume.split(":") for volume in service.get("volumes", []))} <= mounts, role


def is_memory(volume: Manifest) -> bool:
    return bool(volume.get("emptyDir", {}).get("medium") == "Memory")


def test_both_run_the_same_image_with_the_same_folders() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for target in ("cpu", "gpu"):
        assert container(overlay(target), "trainer")["image"].endswith(f"headwater:{target}")
        assert f" AS {target}\n" in dockerfile
    user = workload(overlay("cpu"), "trainer")["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in dockerfile
