"""A running compose stack seen through the container engine: its containers, and how one service is made anew.

What a container is and says comes from the engine (Docker SDK); making it anew is compose's own work, with the files
that the stack was started with, which its containers' labels name.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.processes import readable
from shared.errors import HeadwaterError

SETTINGS_IN_CONTAINER = "/headwater/config/run.toml"
"""Where docker-compose.yml mounts a service's settings."""
_ENGINE_TIMEOUT_S = 60.0


class ComposeError(HeadwaterError):
    """The container engine or compose did not do what was asked, in their own words."""


@dataclass(frozen=True)
class Part:
    """One container of a service, at one look."""

    id: str
    status: str
    """The engine's word: `running`, `restarting`, `exited`, ..."""
    exit_code: int
    num_restarts: int
    """By the restart policy, since the container was made."""
    settings_file: str
    """On this machine; empty if none is mounted."""
    readiness: Mapping[str, Any] = field(default_factory=dict)
    """What /readyz answered; empty while it can't be asked or says no."""

    @property
    def has_ended(self) -> bool:
        """At least once."""
        return self.num_restarts > 0 or self.status in ("restarting", "exited", "dead")


class ComposeStack:
    """The stack of one compose project. Raises ComposeError when the engine can't be reached or has none."""

    def __init__(self, project: str) -> None:
        self.project = project
        self._client = _connect()
        labels = self._any_container().labels
        self.folder = Path(labels["com.docker.compose.project.working_dir"])
        """The project's folder, where .env lies."""
        self._files = labels["com.docker.compose.project.config_files"].split(",")
        self._env_files = [
            path for path in labels.get("com.docker.compose.project.environment_file", "").split(",") if path
        ]

    @property
    def env_file(self) -> Path:
        """The one whose values win."""
        return Path(self._env_files[-1]) if self._env_files else self.folder / ".env"

    def parts(self, service: str, *, ready_url: str) -> list[Part]:
        """The service's containers, as they are now."""
        return [self._look(container, ready_url) for container in self.containers(service)]

    def containers(self, service: str) -> list[Any]:
        """Those that compose keeps for the service, stopped ones too."""
        return self._find(f"com.docker.compose.service={service}", "com.docker.compose.oneoff=False")

    def make_anew(self, service: str, environ: Mapping[str, str], *, timeout_s: float) -> None:
        """Stop the service's containers and start others in their place; no other service is touched."""
        number = max(1, len(self.containers(service)))
        command = [
            *self._compose_command(),
            *(
                "up",
                "--detach",
                "--no-deps",
                "--no-build",
                "--force-recreate",
                "--scale",
                f"{service}={number}",
                service,
            ),
        ]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env={**os.environ, **environ},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise ComposeError(f"`{' '.join(command)}` did not end within {timeout_s:g} s") from exc
        if done.returncode != 0:
            raise ComposeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-2000:]}")

    def log(self, service: str, *, lines: int = 12) -> list[str]:
        """The service's last log lines, JSON ones in readable form."""
        found: list[str] = []
        for container in self.containers(service):
            with _translated():
                text = container.logs(tail=lines).decode("utf-8", errors="replace")
            found += [readable(line) for line in text.splitlines()]
        return found[-lines:]

    def _compose_command(self) -> list[str]:
        docker = shutil.which("docker")
        if docker is None:
            raise ComposeError("no `docker` command on PATH: install Docker with its compose plug-in")
        command = [docker, "compose", "--project-name", self.project, "--project-directory", str(self.folder)]
        command += [word for path in self._env_files for word in ("--env-file", path)]
        return command + [word for path in self._files for word in ("--file", path)]

    def _any_container(self) -> Any:
        found = self._find()
        if not found:
            raise ComposeError(
                f"no containers of a compose project {self.project!r} on this engine: start the stack with "
                "`docker compose up -d --wait`, or name its project with --project"
            )
        return found[0]

    def _find(self, *labels: str) -> list[Any]:
        with _translated():
            wanted = [f"com.docker.compose.project={self.project}", *labels]
            found: list[Any] = self._client.containers.list(all=True, filters={"label": wanted}, ignore_removed=True)
            return found

    def _look(self, container: Any, ready_url: str) -> Part:
        state = container.attrs["State"]
        mounts = {mount["Destination"]: mount.get("Source", "") for mount in container.attrs["Mounts"]}
        return Part(
            id=container.id,
            status=state["Status"],
            exit_code=state["ExitCode"],
            num_restarts=container.attrs["RestartCount"],
            settings_file=mounts.get(SETTINGS_IN_CONTAINER, ""),
            readiness=self._readiness(container, ready_url) if state["Status"] == "running" else {},
        )

    def _readiness(self, container: Any, ready_url: str) -> Mapping[str, Any]:
        """Asked from within: no port need be published. A container that ends meanwhile is not ready."""
        from docker.errors import APIError

        try:
            answer = container.exec_run(["python", "-m", "shared.probe", ready_url], demux=True)
        except APIError:
            return {}
        if answer.exit_code != 0:
            return {}
        found = json.loads(answer.output[0])
        return found if isinstance(found, dict) else {}


def _connect() -> Any:
    """The engine that the `docker` command would use: DOCKER_HOST, or the current context's."""
    try:
        import docker
        from docker.context import ContextAPI
    except ImportError as exc:
        raise ComposeError("the Docker SDK is not installed: pip install 'headwater[compose]'") from exc
    with _translated():
        if os.environ.get("DOCKER_HOST"):
            return docker.from_env(timeout=_ENGINE_TIMEOUT_S)
        context = ContextAPI.get_current_context()
        return docker.DockerClient(base_url=context.Host, tls=context.TLSConfig or False, timeout=_ENGINE_TIMEOUT_S)


@contextmanager
def _translated() -> Iterator[None]:
    """The SDK's errors, and those of the HTTP library below it, as ComposeError."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException) as exc:
        raise ComposeError(f"the container engine can't be used: {exc}; is it running, and may you use it?") from exc
