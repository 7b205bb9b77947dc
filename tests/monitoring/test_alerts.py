"""Alerts: each fires on its trouble (promtool), is explained in docs/operating.md, and is the same in Kubernetes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.queries import ROOT, RULES_FILE, alerts, rules

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
TROUBLES = Path(__file__).with_name("alerts.yml")


def promtool(*arguments: str) -> None:
    answer = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint-fatal", str(RULES_FILE))


@needs_promtool
def test_every_alert_fires_on_its_trouble_and_not_before(tmp_path: Path) -> None:
    file = tmp_path / "alerts.yml"
    file.write_text(TROUBLES.read_text(encoding="utf-8").replace("RULES", str(RULES_FILE)), encoding="utf-8")
    promtool("test", "rules", str(file))


@needs_promtool
def test_an_alert_that_is_missed_is_noticed(tmp_path: Path) -> None:
    """The file of troubles can fail: with thresholds that nothing reaches, it does."""
    quiet = tmp_path / "rules.yml"
    quiet.write_text(RULES_FILE.read_text(encoding="utf-8").replace("> 0.05", "> 5"), encoding="utf-8")
    file = tmp_path / "alerts.yml"
    file.write_text(TROUBLES.read_text(encoding="utf-8").replace("RULES", str(quiet)), encoding="utf-8")
    with pytest.raises(AssertionError, match="HeadwaterVerdictsUnreadable"):
        promtool("test", "rules", str(file))


def test_every_alert_has_a_trouble_that_fires_it() -> None:
    cases = yaml.safe_load(TROUBLES.read_text(encoding="utf-8"))["tests"]
    fired = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in alerts()}


def test_every_alert_has_a_severity_and_one_sentence() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary"}, rule["alert"]


def test_every_alert_is_explained_under_its_own_heading() -> None:
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Headwater\w+)$", page, re.MULTILINE) == [rule["alert"] for rule in alerts()]


def test_kubernetes_has_the_same_rules() -> None:
    """`make k8s-rules` writes the operator's form."""
    file = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["spec"] == rules()
