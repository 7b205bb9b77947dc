"""`python -m services rollout` as a process: starts, stops calmly, fails with one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.services.collector.processes import free_port
from tests.services.serving import is_ready, wait_until


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "services", "rollout", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HEADWATER_TOKEN": "t0ken"},
    )


def test_sigterm_ends_it_with_status_zero(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    process = start("--policy.model", str(tiny_model), "--run.directory", str(tmp_path), "--rollout.port", str(port))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_ready(url), what="the service", timeout_s=180)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "error_type", "words"),
    [
        (["--policy.model", "/nowhere/model"], "EngineError", "/nowhere/model"),
        ([], "SettingsError", "engine.model is empty"),
        (["--rollout.colour", "red"], "SettingsError", "rollout.colour"),
        (["--rollout.engine.kind", "vllm", "--policy.model", "x"], "SettingsError", "make setup-vllm-cpu"),
    ],
)
def test_a_bad_start_is_one_clear_line(tmp_path: Path, arguments: list[str], error_type: str, words: str) -> None:
    process = start(*arguments, "--run.directory", str(tmp_path), "--rollout.port", str(free_port()))
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    (line,) = [entry for entry in map(json.loads, errors.splitlines()) if entry["level"] == "error"]
    assert line["error_type"] == error_type
    assert words in line["message"]


def test_an_open_binding_without_a_token_is_refused(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "services", "rollout", "--policy.model", "x", "--rollout.host", "0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=180,
        env={name: value for name, value in os.environ.items() if not name.startswith("HEADWATER")},
    )
    assert process.returncode == 1
    assert "without a token" in json.loads(process.stderr.splitlines()[-1])["message"]


def test_help_is_fast() -> None:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "services", "rollout", "--help"], check=True, capture_output=True, timeout=60)
    assert time.perf_counter() - started < 10
    code = "import sys, services.__main__; sys.exit(bool({'torch', 'fastapi'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
