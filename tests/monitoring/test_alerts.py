"""Alerts: each fires on its trouble (promtool), is explained in docs/operating.md, and is the same in Kubernetes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.queries import ROOT, RULES_FILE, alerts, rules

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
TROUBLES = Path(__file__).with_name("alerts.yml")


def promtool(*arguments: str) -> None:
    answer = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint-fatal", str(RULES_FILE))


def troubles(folder: Path, rules_file: Path) -> str:
    """The file of troubles for these rules."""
    file = folder / "alerts.yml"
    file.write_text(TROUBLES.read_text(encoding="utf-8").replace("RULES", str(rules_file)), encoding="utf-8")
    return str(file)


@needs_promtool
def test_every_alert_fires_on_its_trouble_and_not_before_and_a_missed_one_is_noticed(tmp_path: Path) -> None:
    promtool("test", "rules", troubles(tmp_path, RULES_FILE))
    quiet = tmp_path / "rules.yml"  # with a threshold that nothing reaches
    quiet.write_text(RULES_FILE.read_text(encoding="utf-8").replace("> 0.05", "> 5"), encoding="utf-8")
    with pytest.raises(AssertionError, match="HeadwaterVerdictsUnreadable"):
        promtool("test", "rules", troubles(tmp_path, quiet))


def test_every_alert_has_a_trouble_that_fires_it() -> None:
    cases = yaml.safe_load(TROUBLES.read_text(encoding="utf-8"))["tests"]
    fired = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in alerts()}


def test_every_alert_has_a_severity_one_sentence_and_a_heading_in_the_documentation() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(names) == len(set(names))
    for rule in alerts():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary"}, rule["alert"]
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (Headwater\w+)$", page, re.MULTILINE) == names


def test_kubernetes_has_the_same_rules() -> None:
    """`make k8s-rules` writes the operator's form."""
    file = ROOT / "k8s" / "components" / "monitoring" / "rules.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["spec"] == rules()
