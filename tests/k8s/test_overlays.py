"""Every overlay renders, is valid for the newest two Kubernetes versions, and keeps what the docs promise."""

import re
from collections.abc import Sequence
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from shared.configuration import load_settings
from shared.metrics import ROLES
from tests.k8s.rendering import (
    COMPONENT,
    COMPONENTS,
    K8S,
    OVERLAYS,
    Manifest,
    all_containers,
    find,
    of_kind,
    overlay,
    port_of,
    saved_config,
    with_components,
    workload,
    workloads,
)

NEWEST = str(kubernetes_validate.latest_version())
MAJOR, MINOR, *_ = NEWEST.split(".")
CUSTOM_KINDS = {"PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of operators; their schemas are not among Kubernetes' own."""


def check_schema(manifests: Sequence[Manifest], version: str) -> None:
    for one in manifests:
        if one["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("version", [NEWEST, f"{MAJOR}.{int(MINOR) - 1}.0"])
@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_are_valid(name: str, version: str) -> None:
    check_schema(overlay(name), version)


def test_validation_finds_what_kubernetes_would_not_know() -> None:
    broken = dict(find(overlay("cpu"), "Service", "rollout"))
    broken["spec"] = broken["spec"] | {"portz": []}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_schema([broken], NEWEST)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("base", ["cpu", "gpu"])
def test_every_component_fits_on_either_overlay(component: str, base: str, tmp_path: Path) -> None:
    if component in own_components(base):
        pytest.skip(f"overlays/{base} has {component} already")
    check_schema(with_components(tmp_path, base, [component]), NEWEST)


def own_components(name: str) -> set[str]:
    kustomization = yaml.safe_load((K8S / "overlays" / name / "kustomization.yaml").read_text(encoding="utf-8"))
    return {Path(place).name for place in kustomization["components"]}


def test_all_components_fit_together(tmp_path: Path) -> None:
    manifests = with_components(tmp_path, "gpu", [name for name in COMPONENTS if name not in own_components("gpu")])
    check_schema(manifests, NEWEST)
    assert not of_kind(manifests, "StatefulSet")
    assert {one["metadata"]["name"] for one in of_kind(manifests, "ScaledObject")} == {"rollout", "collector"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_keep_the_restricted_standard(name: str) -> None:
    labels = find(overlay(name), "Namespace", "headwater")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for role, template in workloads(overlay(name)):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, role
        assert spec["securityContext"]["runAsUser"] > 0, role
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, role
        assert spec["automountServiceAccountToken"] is False, role
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), role
        assert all(volume.keys() - {"name"} <= VOLUMES for volume in spec["volumes"]), role
        # or Kubernetes sets HEADWATER_…_SERVICE_HOST for a service named headwater-…, an unknown setting: an error
        assert spec["enableServiceLinks"] is False
        for one in all_containers(spec):
            assert one["securityContext"] == HARDENED, (role, one["name"])


VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim"}
HARDENED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


@pytest.mark.parametrize("name", OVERLAYS)
def test_containers_say_what_they_need_and_scratch_space_is_bounded(name: str) -> None:
    for role, template in workloads(overlay(name)):
        for one in all_containers(template["spec"]):
            assert one["resources"]["requests"].keys() >= {"cpu", "memory"}, (role, one["name"])
            assert "memory" in one["resources"]["limits"], (role, one["name"])
        for volume in template["spec"]["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], (role, volume["name"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_accelerators_are_asked_for_exactly_where_models_run(name: str) -> None:
    for role, template in workloads(overlay(name)):
        spec = template["spec"]
        wanted = name.startswith("gpu") and role in {"rollout", "rewriter", "judge", "trainer"}
        limits = [one["resources"]["limits"].get("nvidia.com/gpu", 0) for one in spec["containers"]]
        assert limits == [1 if wanted else 0], role
        assert ("nodeSelector" in spec, "tolerations" in spec) == (wanted, wanted), role


@pytest.mark.parametrize("name", OVERLAYS)
def test_everything_named_is_there(name: str) -> None:
    """ConfigMaps, claims and Secrets that pods name, and ports that Services and probes name."""
    manifests = overlay(name)
    there = {(one["kind"], one["metadata"]["name"]) for one in manifests} | {("Secret", secret) for secret in SECRETS}
    sets = of_kind(manifests, "StatefulSet")
    claims = {one["metadata"]["name"]: one["spec"]["volumeClaimTemplates"] for one in sets}
    for role, template in workloads(manifests):
        for reference in references(template["spec"]):
            assert reference in there, (role, reference)
        for one in template["spec"]["containers"]:
            ports = {port["name"] for port in one.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if "httpGet" in one.get(probe, {}):
                    assert one[probe]["httpGet"]["port"] in ports, (role, probe)
            mounted = {mount["name"] for mount in one["volumeMounts"]}
            claimed = {claim["metadata"]["name"] for claim in claims.get(role, [])}
            assert mounted <= {volume["name"] for volume in template["spec"]["volumes"]} | claimed, role
    for service in of_kind(manifests, "Service"):
        selected = workload(manifests, service["metadata"]["name"])["containers"][0]["ports"]
        for port in service["spec"]["ports"]:
            assert {"name": port["targetPort"], "containerPort": port["port"]} in selected, service["metadata"]["name"]


SECRETS = set(re.findall(r"- name: (\S+)", (K8S / "secrets" / "kustomization.yaml").read_text(encoding="utf-8")))


def references(spec: Manifest) -> set[tuple[str, str]]:
    """(kind, name) of what a pod can't start without."""
    found = set()
    for volume in spec["volumes"]:
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for one in all_containers(spec):
        for source in one.get("envFrom", []):
            for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if field in source:
                    found.add((kind, source[field]["name"]))
        for variable in one.get("env", []):
            if "valueFrom" in variable:
                found.add(("Secret", variable["valueFrom"]["secretKeyRef"]["name"]))
    return found


@pytest.mark.parametrize("name", OVERLAYS)
def test_settings_load_and_no_secret_is_rendered(name: str, tmp_path: Path) -> None:
    manifests = overlay(name)
    assert not of_kind(manifests, "Secret")
    environ = find(manifests, "ConfigMap", "run")["data"]
    for config in ("settings", "judge"):
        settings = load_settings(saved_config(manifests, config, tmp_path), environ=environ)
        assert settings.weight_store_url == f"/headwater/weights/{settings.run.name}"
        for role in ROLES:  # the trainer's port is named by its environment: see test_agreement.py
            port = 8005 if role == "trainer" else getattr(settings, role).port
            assert port == port_of(manifests, role)


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_replica_of_a_role_at_a_time_may_leave_and_applying_again_keeps_their_number(name: str) -> None:
    budgets = [one["spec"] for one in of_kind(overlay(name), "PodDisruptionBudget")]
    found = {one["selector"]["matchLabels"][COMPONENT]: one["maxUnavailable"] for one in budgets}
    assert found == {"rollout": 1, "rewriter": 1, "judge": 1, "collector": 1}
    assert all("replicas" not in one["spec"] for one in of_kind(overlay(name), "Deployment"))


def test_the_trainer_is_one_indexed_process_that_may_finish_its_step() -> None:
    job = find(overlay("gpu"), "Job", "trainer")["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 1, 1)
    spec = job["template"]["spec"]
    command = spec["containers"][0]["command"]
    torchrun = ["python", "-m", "torch.distributed.run"]  # the bare one is the system's in the GPU image
    assert command[:6] == [*torchrun, "--standalone", "--nnodes=1", "--nproc-per-node=1"]
    [timeout] = [int(word.partition("=")[2]) for word in command if word.startswith("--shutdown-timeout=")]
    assert 60 <= timeout < spec["terminationGracePeriodSeconds"]
    [ignored] = job["podFailurePolicy"]["rules"]
    assert (ignored["action"], ignored["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget"}])


def test_autoscaling_counts_from_the_settings_of_the_overlay(tmp_path: Path) -> None:
    manifests = with_components(tmp_path, "gpu", ["autoscale-rollout", "autoscale-collector"])
    settings = load_settings(saved_config(manifests, "settings", tmp_path), environ={})
    collector = find(manifests, "ScaledObject", "collector")["spec"]
    metadata = collector["triggers"][0]["metadata"]
    assert metadata["query"].startswith(f"clamp_min({settings.collector.max_backlog} - ")
    assert settings.collector.max_backlog / int(metadata["threshold"]) == collector["maxReplicaCount"]
    assert settings.documents.num_parts >= collector["maxReplicaCount"]
    for name in ("rollout", "collector"):
        assert find(manifests, "ScaledObject", name)["spec"]["scaleTargetRef"] == {"name": name}
        assert find(manifests, "Deployment", name)


def test_an_object_store_takes_the_volumes_place(tmp_path: Path) -> None:
    manifests = with_components(tmp_path, "gpu", ["s3-weights"])
    assert "weights" not in {one["metadata"]["name"] for one in of_kind(manifests, "PersistentVolumeClaim")}
    for role in ("rollout", "trainer"):
        spec = workload(manifests, role)
        assert "weights" not in {volume["name"] for volume in spec["volumes"]}
        [main] = spec["containers"]
        assert "/headwater/weights" not in {mount["mountPath"] for mount in main["volumeMounts"]}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= {variable["name"] for variable in main["env"]}
