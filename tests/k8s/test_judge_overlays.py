"""Swapping the judge is applying one overlay, and restarts the judge alone."""

import tomllib
from copy import deepcopy
from pathlib import Path

import pytest

from shared.configuration import load_settings
from tests.k8s.rendering import K8S, ROOT, Manifest, find, overlay

SWAPS = [("cpu", "cpu-judge-safety"), ("gpu", "gpu-judge-safety")]


def by_name(name: str) -> dict[tuple[str, str], Manifest]:
    return {(one["kind"], one["metadata"]["name"]): one for one in overlay(name)}


@pytest.mark.parametrize(("before", "after"), SWAPS)
def test_only_the_settings_of_the_judge_differ(before: str, after: str) -> None:
    old, new = by_name(before), by_name(after)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    old_config, new_config = (find(overlay(name), "ConfigMap", "judge")["metadata"]["name"] for name in (before, after))
    assert old_config != new_config
    assert changed == {("ConfigMap", old_config), ("ConfigMap", new_config), ("Deployment", "judge")}
    pods = deepcopy(find(overlay(before), "Deployment", "judge"))
    [volume] = [one for one in pods["spec"]["template"]["spec"]["volumes"] if one["name"] == "judge"]
    volume["configMap"]["name"] = new_config
    assert pods == find(overlay(after), "Deployment", "judge")


@pytest.mark.parametrize("name", [after for _, after in SWAPS])
def test_the_new_judge_scores_something_else(name: str) -> None:
    before = load_settings(judge_file(name.removesuffix("-judge-safety")), environ={}).judge
    assert load_settings(judge_file(name), environ={}).judge.criteria != before.criteria


def judge_file(name: str) -> Path:
    own = {"cpu": ROOT / "configs" / "starter.toml", "gpu": K8S / "overlays" / "gpu" / "judge.toml"}
    return own.get(name, K8S / "overlays" / name / "run.toml")


def test_compose_and_kubernetes_swap_to_the_same_judge() -> None:
    compose = (ROOT / "configs" / "starter-judge-safety.toml").read_text(encoding="utf-8")
    kubernetes = judge_file("cpu-judge-safety").read_text(encoding="utf-8")
    assert tomllib.loads(compose) == tomllib.loads(kubernetes)
