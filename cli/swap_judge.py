"""`headwater swap-judge`: Restart the judge of a running compose stack with other settings and wait until it is ready.

    read the settings -> compose recreates the judge's container -> keep the file in .env -> wait for /readyz -> report

Nothing else restarts: the collector retries meanwhile, and chunks judged from then on carry the new fingerprint. In
Kubernetes, `kubectl apply` an overlay that changes the judge's ConfigMap instead.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.processes import readable
from shared.configuration import load_settings
from shared.errors import HeadwaterError, SettingsError

VARIABLE = "STACK_JUDGE_CONFIG"
"""docker-compose.yml mounts this file for the judge."""
READY_URL = "http://127.0.0.1:8003/readyz"
LOOK_EVERY_S = 1.0
SETTINGS_IN_CONTAINER = "/headwater/config/run.toml"
"""Where docker-compose.yml mounts a service's settings."""
_ENGINE_TIMEOUT_S = 60.0


class ComposeError(HeadwaterError):
    """The container engine or compose failed; the message has its words."""


@dataclass(frozen=True)
class Part:
    """One container of a service, at one look."""

    id: str
    status: str
    """The engine's word: `running`, `restarting`, `exited`, ..."""
    exit_code: int
    num_restarts: int
    """By the restart policy, since the container was created."""
    settings_file: str
    """Path on this machine; empty if none is mounted."""
    readiness: Mapping[str, Any] = field(default_factory=dict)
    """The answer of /readyz; empty while it is not ready."""

    @property
    def has_ended(self) -> bool:
        return self.num_restarts > 0 or self.status in ("restarting", "exited", "dead")


def swap_judge(
    settings: Annotated[Path, typer.Argument(metavar="SETTINGS", help="TOML file with the new [judge] section.")],
    *,
    project: Annotated[str, typer.Option(help="Compose project.")] = "headwater",
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds within which it must be ready.")] = 600.0,
) -> int:
    """0 once the judge is ready; HeadwaterError has the judge's log and the way back."""
    load_settings(settings, environ={})  # fail on a mistake while the old judge still works
    stack = ComposeStack(project)
    print("\n".join(swap_in(stack, mounted_path(settings, stack.folder), timeout_s=timeout)))
    return 0


def swap_in(
    stack: "ComposeStack", mounted: str, *, timeout_s: float, clock: Callable[[], float] = time.monotonic
) -> list[str]:
    """Replace the judge, wait, and say what changed. ComposeError when it ended, or was not ready in time."""
    began = clock()
    before = stack.parts("judge", ready_url=READY_URL)
    if not before:
        raise ComposeError(f"compose project {stack.project!r} has no judge: `docker compose up -d judge` starts one")
    stack.recreate("judge", {VARIABLE: mounted}, timeout_s=timeout_s)
    keep_variable(stack.env_file, VARIABLE, mounted)  # the next `docker compose up` keeps this judge
    old = {part.id for part in before}
    while True:
        after = [part for part in stack.parts("judge", ready_url=READY_URL) if part.id not in old]
        if len(after) >= len(before) and all(part.readiness.get("ready") for part in after):
            break
        ended = next((part for part in after if part.has_ended), None)
        if ended is not None:
            raise _failure(stack, before, _how_it_ended(ended))
        if clock() - began > timeout_s:
            raise _failure(stack, before, f"it did not become ready within {timeout_s:g} s")
        time.sleep(LOOK_EVERY_S)
    lines = [
        f"the judge of {stack.project} is ready, {clock() - began:.1f} s after the swap began",
        *(f"  {name:<11}  {_shown(before, name)} -> {_shown(after, name)}" for name in ("fingerprint", "model")),
        f"  settings     {before[0].settings_file or 'unknown'} -> {mounted} ({VARIABLE} in {stack.env_file})",
    ]
    if _shown(before, "fingerprint") == _shown(after, "fingerprint"):
        lines.append("The fingerprint is the same: these settings judge as the old ones did.")
    return lines


def mounted_path(settings_file: Path, folder: Path) -> str:
    """The path as .env needs it: `./...` below the project's folder, elsewhere absolute."""
    path = settings_file.resolve()
    shown = f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)
    if any(character in shown for character in ":'\n$"):
        raise SettingsError(f"{shown!r} cannot be mounted by compose: use a path without : ' $ and line ends")
    return shown


def keep_variable(env_file: Path, name: str, value: str) -> None:
    """Set `name` in an .env file and keep its other lines; only the owner may read the file."""
    lines = env_file.read_text(encoding="utf-8").splitlines() if env_file.exists() else []
    kept = [line for line in lines if not line.strip().startswith(f"{name}=")]
    temporary = env_file.with_name(f"{env_file.name}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join([*kept, f"{name}='{value}'"]) + "\n")
    temporary.replace(env_file)


def _how_it_ended(part: Part) -> str:
    if part.status == "running":
        return f"it ended before it was ready and has been restarted {part.num_restarts} times"
    return f"it ended with exit status {part.exit_code} before it was ready"


def _failure(stack: "ComposeStack", before: Sequence[Part], why: str) -> ComposeError:
    log = "\n".join(f"    {line}" for line in stack.log("judge"))
    way_back = before[0].settings_file or "the settings it had"
    return ComposeError(
        f"the new judge is not in service: {why}. The run waits and loses nothing. To go back:\n"
        f"    headwater swap-judge {way_back} --project {stack.project}\n"
        f"The judge's last log lines:\n{log}"
    )


def _shown(parts: Sequence[Part], key: str) -> str:
    return ", ".join(sorted({str(part.readiness.get(key) or "unknown") for part in parts}))


class ComposeStack:
    """A running compose project.

    The engine (Docker SDK) tells what its containers are and say; `docker compose` recreates them, with the files named
    in their labels. ComposeError when the engine cannot be reached or does not have the project.
    """

    def __init__(self, project: str) -> None:
        self.project = project
        self._client = _connect()
        found = self._find()
        if not found:
            raise ComposeError(
                f"no containers of a compose project {self.project!r} on this engine: start the stack with "
                "`docker compose up -d --wait`, or name its project with --project"
            )
        labels = found[0].labels
        self.folder = Path(labels["com.docker.compose.project.working_dir"])
        """The project's folder, where .env lies."""
        self._files = labels["com.docker.compose.project.config_files"].split(",")
        self._env_files = list(filter(None, labels.get("com.docker.compose.project.environment_file", "").split(",")))

    @property
    def env_file(self) -> Path:
        """The last one, whose values win."""
        return Path(self._env_files[-1]) if self._env_files else self.folder / ".env"

    def parts(self, service: str, *, ready_url: str) -> list[Part]:
        return [self._look(container, ready_url) for container in self.containers(service)]

    def containers(self, service: str) -> list[Any]:
        """The service's containers, stopped ones included."""
        return self._find(f"com.docker.compose.service={service}", "com.docker.compose.oneoff=False")

    def recreate(self, service: str, environ: Mapping[str, str], *, timeout_s: float) -> None:
        """Replace the service's containers by new ones; no other service is touched."""
        number = max(1, len(self.containers(service)))
        options = ["--detach", "--no-deps", "--no-build", "--force-recreate", "--scale", f"{service}={number}"]
        command = [*self._compose_command(), "up", *options, service]
        try:
            done = subprocess.run(
                command, cwd=self.folder, env={**os.environ, **environ}, capture_output=True, text=True,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise ComposeError(f"`{' '.join(command)}` did not end within {timeout_s:g} s") from exc
        if done.returncode != 0:
            raise ComposeError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-2000:]}")

    def log(self, service: str, *, lines: int = 12) -> list[str]:
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
        """Asked inside the container: its port may be unpublished. A container that ends meanwhile is not ready."""
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
    """The engine of the `docker` command: DOCKER_HOST, or that of the current context."""
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
    """Errors of the SDK and of its HTTP library become ComposeError."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException) as exc:
        raise ComposeError(f"the container engine cannot be used: {exc}; is it running, and may you use it?") from exc
