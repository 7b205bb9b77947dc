"""A real Prometheus scrapes a real run, and answers every query of alerts, dashboards and autoscalers."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cli.demo import world_options
from shared.http import authorization_header
from shared.metrics import ROLES
from starter.documents import documents, write_documents
from starter.world import World
from tests.monitoring.queries import ROOT, RULES_FILE, Query, alerts, all_queries, dashboard_queries
from tests.services.collector.processes import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus: apt-get install prometheus"),
]

WAIT_S = 300.0
QUIET_IN_A_HEALTHY_RUN = {
    "headwater-run: Dropped windows by reason",
    "headwater-run: Absent candidates",
    "headwater-run: Dropped chunks",
    "headwater-services: Retries a second",
    "headwater-services: Unreadable verdicts",
    "headwater-run: Judge swapped",
    "headwater-services: Judge swapped",
}
"""Series with a label that come into being with the first event."""


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30, trust_env=False)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body}"
        return body["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def number(self, expression: str) -> float:
        return max((float(one["value"][1]) for one in self.query(expression)), default=0.0)


@contextmanager
def running(command: list[str], log: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped in the end, whatever happens."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=60)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.5)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus beside a run of the starter world that has taken some steps."""
    folder = tmp_path_factory.mktemp("scraped")
    token = secrets.token_urlsafe(16)
    write_documents(folder / "documents.jsonl", documents(World(0), 200))
    command = [
        sys.executable, "-m", "cli.main", "run", str(ROOT / "starter" / "demo.toml"), "--run.name", "scraped",
        "--run.directory", str(folder), "--trainer.metrics_port", str(free_port()), "--trainer.checkpoint_every", "2",
        "--trainer.steps", "1000", *world_options(folder / "documents.jsonl"),
    ]  # fmt: skip
    log = folder / "run.log"
    with ExitStack() as stack:
        run = stack.enter_context(running(command, log, os.environ | {"HEADWATER_TOKEN": token}))
        processes = folder / "scraped" / "processes.toml"
        wait_until(processes.exists, run, log)
        found = Prometheus(f"http://127.0.0.1:{free_port()}")
        configuration = write_configuration(folder, tomllib.loads(processes.read_text(encoding="utf-8")), token)
        server_log = folder / "prometheus.log"
        words = ["prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={folder / 'series'}"]
        words.append(f"--web.listen-address={found.url.removeprefix('http://')}")
        server = stack.enter_context(running(words, server_log, dict(os.environ)))
        wait_until(lambda: is_answering(found.url), server, server_log)
        wait_until(lambda: found.number("max(headwater_step)") >= 4, run, log)
        wait_until(lambda: found.number("max(headwater_weight_version{job='rollout'})") >= 2, run, log)
        yield found


def write_configuration(folder: Path, settings: dict[str, Any], token: str) -> Path:
    """The jobs of monitoring/prometheus/prometheus.yml, at the ports that this run took."""
    ports = {role: settings[role]["metrics_port" if role == "trainer" else "port"] for role in ROLES}
    (folder / "token").write_text(token, encoding="utf-8")
    jobs = [
        {
            "job_name": role,
            "authorization": {"credentials_file": str(folder / "token")},
            "static_configs": [{"targets": [f"127.0.0.1:{port}"], "labels": {"namespace": "headwater"}}],
        }
        for role, port in ports.items()
    ]
    intervals = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration = {"global": intervals, "rule_files": [str(RULES_FILE)], "scrape_configs": jobs}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return path


def is_answering(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def test_every_part_of_the_stack_is_scraped_with_the_token(prometheus: Prometheus) -> None:
    assert {one["metric"]["job"]: one["value"][1] for one in prometheus.query("up")} == dict.fromkeys(ROLES, "1")
    headers = authorization_header("another token")
    for target in prometheus.get("targets")["activeTargets"]:
        assert httpx.get(target["scrapeUrl"], headers=headers, timeout=10, trust_env=False).status_code == 401


@pytest.mark.parametrize("query", all_queries(), ids=str)
def test_every_query_is_answered(prometheus: Prometheus, query: Query) -> None:
    prometheus.query(query.expression)


@pytest.mark.parametrize(
    "query", [one for one in dashboard_queries() if one.place not in QUIET_IN_A_HEALTHY_RUN], ids=str
)
def test_panels_of_a_healthy_run_show_something(prometheus: Prometheus, query: Query) -> None:
    deadline = time.monotonic() + 60
    while not prometheus.query(query.expression):
        assert time.monotonic() < deadline, f"no data: {query.expression}"
        time.sleep(1)


def test_alerts_are_evaluated_and_a_healthy_run_raises_none(prometheus: Prometheus) -> None:
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in found} == {rule["alert"] for rule in alerts()}
    assert {rule["name"]: (rule["health"], rule["state"]) for rule in found if rule["state"] == "firing"} == {}
    assert {rule["health"] for rule in found} == {"ok"}
