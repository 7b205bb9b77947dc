"""Prometheus' and Grafana's files fit the stack that they watch: names, ports, places."""

import shutil
import subprocess
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from shared.metrics import ROLES
from tests.monitoring.queries import DASHBOARDS, MONITORING, PROMETHEUS_FILE, ROOT, dashboard


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


PROMETHEUS = yaml.safe_load(PROMETHEUS_FILE.read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus")
def test_promtool_accepts_the_configuration() -> None:
    command = ["promtool", "check", "config", "--syntax-only", str(PROMETHEUS_FILE)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_role_is_scraped_where_compose_has_it() -> None:
    services = load("docker-compose.yml")["services"]
    found = {}
    for job in PROMETHEUS["scrape_configs"]:
        [discovery] = job["dns_sd_configs"]
        assert discovery["names"] == [job["job_name"]]
        found[job["job_name"]] = discovery["port"]
    assert found == {role: urlsplit(services[role]["healthcheck"]["test"][-1]).port for role in ROLES}


def test_the_token_is_where_compose_puts_it() -> None:
    [file] = {job["authorization"]["credentials_file"] for job in PROMETHEUS["scrape_configs"]}
    entrypoint = load("compose/monitoring.yml")["services"]["prometheus"]["entrypoint"]
    [command] = [word for word in entrypoint if "\n" in word]
    assert f"> {file}" in command


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    compose = load("compose/monitoring.yml")["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    [provider] = load("monitoring/grafana/provisioning/dashboards/headwater.yml")["providers"]
    assert mounts["./monitoring/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./monitoring/grafana/provisioning"] == "/etc/grafana/provisioning"
    [source] = load("monitoring/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert urlsplit(source["url"]).hostname in compose
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_kubernetes_gets_every_dashboard() -> None:
    [generated] = load("monitoring/kustomization.yaml")["configMapGenerator"]
    assert sorted(generated["files"]) == [str(path.relative_to(MONITORING)) for path in DASHBOARDS]
    assert len({dashboard(path)["title"] for path in DASHBOARDS}) == len(DASHBOARDS)
