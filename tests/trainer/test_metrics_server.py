"""Prometheus reads the trainer as it reads the services."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from shared import metrics
from shared.errors import SettingsError
from shared.settings import Secrets
from tests.services.collector.processes import free_port
from trainer.metrics_server import serving_metrics

SECRETS = Secrets(token="t0ken")


def get(port: int, path: str, token: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=5, trust_env=False)


def test_figures_are_served_to_who_has_a_token() -> None:
    metrics.step.set(17)
    with serving_metrics("127.0.0.1", free_port(), SECRETS) as port:
        assert port
        lines = get(port, "/metrics", SECRETS.token).text.splitlines()
        assert "headwater_step 17.0" in lines
        assert not any(line.startswith("headwater_leased_parts") for line in lines)


def test_others_are_refused_and_health_is_open() -> None:
    with serving_metrics("127.0.0.1", free_port(), SECRETS) as port:
        assert port
        assert [get(port, "/metrics", token).status_code for token in ("", "guess")] == [401, 401]
        assert get(port, "/healthz").text == "ok\n"
        assert get(port, "/weights", SECRETS.token).status_code == 404


def test_a_port_of_0_serves_nothing() -> None:
    with serving_metrics("127.0.0.1", 0, SECRETS) as port:
        assert port is None


def test_the_port_is_free_again_afterwards() -> None:
    wanted = free_port()
    for _ in range(2):
        with serving_metrics("127.0.0.1", wanted, SECRETS) as port:
            assert port == wanted


def test_a_taken_port_and_an_open_binding_are_settings_errors() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with (
            pytest.raises(SettingsError, match="choose another port"),
            serving_metrics("127.0.0.1", other.getsockname()[1], SECRETS),
        ):
            raise AssertionError("served on a taken port")
    with pytest.raises(SettingsError, match="HEADWATER_TOKEN"), serving_metrics("0.0.0.0", 1, Secrets()):
        raise AssertionError("served openly")


def test_a_trainer_that_cannot_listen_ends_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = {"redis.url": "redis://127.0.0.1:1/0", "policy.model": "x", "run.directory": str(tmp_path)}
        words["trainer.metrics_port"] = str(other.getsockname()[1])
        options = [word for name, value in words.items() for word in (f"--{name}", value)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
        answer = subprocess.run(
            [sys.executable, "-m", "trainer", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environment,
        )
    assert answer.returncode == 1
    assert "trainer.metrics_port" in answer.stderr
