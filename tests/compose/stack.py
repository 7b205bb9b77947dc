"""A compose project under test: its commands through `docker compose`, its containers through the Docker SDK."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker

from cli.swap_judge import ComposeStack

ROOT = Path(__file__).parents[2]
PROJECT = "headwater-test"
SERVICES = ("redis", "postgres", "rollout", "rewriter", "judge", "collector", "trainer")
MANY_STEPS = 100_000
"""However fast the machine is, the run must not end before everything has happened to it."""
COMMAND_S = 1200.0
WAIT_S = 300.0


class Stack:
    """docker-compose.yml unmodified; what a person would set in .env stands in an env file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self._env_file = folder / "stack.env"
        subprocess.run(["sh", str(ROOT / "compose/make-env.sh"), str(self._env_file)], check=True, timeout=30)
        with self._env_file.open("a", encoding="utf-8") as file:
            file.write(f"STACK_CONFIG={self.folder / 'run.toml'}\nSTACK_ROLLOUT_PORT={self.port}\n")
        self.set_steps(MANY_STEPS)

    def set_steps(self, number: int) -> None:
        """The starter's settings with another number of steps, in the file that containers have mounted."""
        text = (ROOT / "configs/starter.toml").read_text(encoding="utf-8")
        assert "\nsteps = 60\n" in text
        changed = text.replace("\nsteps = 60\n", f"\nsteps = {number}\n")
        (self.folder / "run.toml").write_text(changed, encoding="utf-8")

    def compose(self, *words: str) -> str:
        """Standard output of a compose command that must succeed."""
        command = ["docker", "compose", "--project-name", PROJECT, "--env-file", str(self._env_file), *words]
        done = subprocess.run(
            command, cwd=ROOT, env=_environ(), capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def timed(self, *words: str) -> float:
        """Seconds of a compose command."""
        began = time.monotonic()
        self.compose(*words)
        return time.monotonic() - began

    def container(self, service: str) -> Any:
        """As it is now."""
        (found,) = ComposeStack(PROJECT).containers(service)
        return found

    def state(self, service: str) -> dict[str, Any]:
        state: dict[str, Any] = self.container(service).attrs["State"]
        return state

    def lives(self) -> dict[str, tuple[str, str]]:
        """Which container each service has, and since when it runs."""
        return {service: (self.container(service).id, self.state(service)["StartedAt"]) for service in SERVICES}

    def inside(self, service: str, *command: str) -> str:
        """Output of a command in a running container, as the container's own user. It must succeed."""
        answer = self.container(service).exec_run(list(command))
        text: str = answer.output.decode()
        assert answer.exit_code == 0, f"{service}: {' '.join(command)}: {text}"
        return text

    def kill_inside(self, service: str) -> None:
        """SIGKILL to all that runs in it. Not `docker kill`: the engine takes that for a stop that a person wants, and
        its restart policy does nothing then."""
        self.container(service).exec_run(["sh", "-c", "kill -9 -1"])

    def query(self, statement: str) -> str:
        """One value or column from the run's database."""
        command = f'PGPASSWORD=$POSTGRES_PASSWORD psql -h 127.0.0.1 -U headwater -At -c "{statement}" headwater'
        return self.inside("postgres", "sh", "-c", command).strip()

    def step(self) -> int:
        return int(self.query("select coalesce(max(step), 0) from steps where run_id = 'starter'"))

    def headwater(self, *words: str) -> str:
        return self.compose("run", "--rm", "--no-TTY", "headwater", *words)

    def audit(self) -> dict[str, Any]:
        """Its findings; a run that does not balance fails here."""
        findings: dict[str, Any] = json.loads(self.headwater("audit", "starter", "--json"))
        return findings

    def is_ready(self, service: str) -> bool:
        state = self.state(service)
        return bool(state["Running"]) and state["Health"]["Status"] == "healthy"

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_s: float = WAIT_S) -> float:
        """Seconds until `condition` holds."""
        began = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - began
            assert waited_s < timeout_s, f"{what}: not within {timeout_s:g} s\n{self.compose('ps', '--all')}"
            time.sleep(0.5)
        return time.monotonic() - began

    def wait_for_steps(self, number: int) -> float:
        """Until the trainer has taken so many more."""
        goal = self.step() + number
        return self.wait(lambda: self.step() >= goal, f"step {goal}")

    def image_bytes(self) -> int:
        size: int = docker.from_env().images.get("headwater:cpu").attrs["Size"]
        return size


def _environ() -> dict[str, str]:
    """Without what would override the env file; package indexes for the build pass."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("HEADWATER_", "STACK_", "COMPOSE_"))
    }


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port
