"""What a run consists of: which roles, on which ports, with which environment. Used by run and check; starts nothing.

A service with a `url` runs elsewhere. Only objectives that choose by reward need the judge; rewriter and rollout are
needed if some stage of the schedule makes their kind of candidate.
"""

import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self, TypeVar
from urllib.parse import quote

from shared.configuration import load_secrets, secret_variables
from shared.engine_settings import ServiceSettings
from shared.errors import HeadwaterError
from shared.http import generate_token
from shared.metrics import ENGINES
from shared.settings import CollectorSettings, Secrets, Settings, TrainerSettings

_Listening = TypeVar("_Listening", ServiceSettings, CollectorSettings, TrainerSettings)
REDIS_HOST = "127.0.0.1"
"""Where an embedded Redis listens."""


class Ports:
    """The ports this launcher has taken, each with a file lock until it ends: another launcher that starts at the same
    moment would otherwise find the port free before our service has bound it."""

    def __init__(self) -> None:
        self._locks: list[IO[bytes]] = []
        self._folder = Path(tempfile.gettempdir()) / f"headwater-ports-{os.getuid()}"

    def __enter__(self) -> Self:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    def take(self, host: str, wanted: int) -> int:
        """`wanted` if it is free; else, and for 0, one that the system picks."""
        if wanted and self._claim(host, wanted):
            return wanted
        for _ in range(100):
            with socket.socket(_family(host)) as probe:
                probe.bind((host, 0))
                port = int(probe.getsockname()[1])
            if self._claim(host, port):
                return port
        raise HeadwaterError(f"found no free port on {host} in 100 tries")

    def _claim(self, host: str, port: int) -> bool:
        lock = (self._folder / f"{port}.lock").open("ab")
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_free(host, port):
                self._locks.append(lock)
                return True
        lock.close()
        return False


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind there now."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def redis_url(port: int, password: str) -> str:
    return f"redis://:{quote(password, safe='')}@{REDIS_HOST}:{port}/0"


@dataclass(frozen=True)
class Plan:
    settings: Settings
    """With the ports that were taken. `redis.url` stays empty when Redis is embedded: its URL has a password."""
    secrets: Secrets
    roles: tuple[str, ...]
    """What this launcher starts besides Redis, in order."""
    embedded_redis_port: int | None
    notes: tuple[str, ...]
    """Ports that had to move, as sentences."""

    @property
    def redis_url(self) -> str:
        if self.embedded_redis_port is None:
            return self.settings.redis.url
        return redis_url(self.embedded_redis_port, self.secrets.token)

    @property
    def num_processes(self) -> int:
        """Without the launcher and torchrun."""
        return len(self.roles) - 1 + self.settings.trainer.num_processes + (self.embedded_redis_port is not None)

    def ready_url(self, role: str) -> str | None:
        """The role's /readyz; None for the trainer, which serves no requests."""
        if role == "trainer":
            return None
        section = self.settings.collector if role == "collector" else self.service(role)
        return f"http://{_reachable(section.host)}:{section.port}/readyz"

    def service(self, role: str) -> ServiceSettings:
        return service_settings(self.settings, role)

    def command(self, role: str) -> list[str]:
        """The role's process reads its settings from the run folder."""
        words = ["trainer"] if role == "trainer" else ["services", role]
        if role == "trainer" and (number := self.settings.trainer.num_processes) > 1:
            words = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
            words += ["--shutdown-timeout=25", "-m", "trainer"]
        return [sys.executable, "-m", *words, "--config", str(self.settings.run.folder / "processes.toml")]

    def environ(self) -> dict[str, str]:
        """The children's environment. Secrets in settings travel here, since the settings file has none."""
        own = {"HEADWATER_TOKEN": self.secrets.token, "HEADWATER_REDIS__URL": self.redis_url}
        return child_environ() | secret_variables(self.settings) | own


def child_environ() -> dict[str, str]:
    """This process's environment without HEADWATER_*: the children's file has those settings, with the ports in use."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}


def make_plan(settings: Settings, ports: Ports, *, environ: Mapping[str, str] | None = None) -> Plan:
    """Take a token and the ports for everything that `settings` needs on this machine."""
    given = load_secrets(os.environ if environ is None else environ)
    services = [role for role in needed_services(settings) if not service_settings(settings, role).url]
    notes: list[str] = []
    updates: dict[str, object] = {}
    for role in services:
        updates[role] = _with_free_port(service_settings(settings, role), role, ports, notes)
    updates["collector"] = _with_free_port(settings.collector, "collector", ports, notes)
    if settings.trainer.metrics_port:
        updates["trainer"] = _with_free_port(settings.trainer, "trainer", ports, notes, key="metrics_port")
    return Plan(
        settings=settings.model_copy(update=updates),
        secrets=Secrets(token=given.token or generate_token()),
        roles=(*services, "collector", "trainer"),
        embedded_redis_port=None if settings.redis.url else ports.take(REDIS_HOST, 0),
        notes=tuple(notes),
    )


def needed_services(settings: Settings) -> list[str]:
    """Roles that the collector will call, wherever they run."""
    kinds = settings.kinds
    wanted = {"rollout": "rollout" in kinds, "rewriter": "rewrite" in kinds, "judge": settings.needs_judge}
    return [role for role in ENGINES if wanted[role]]


def service_settings(settings: Settings, role: str) -> ServiceSettings:
    found = getattr(settings, role)
    assert isinstance(found, ServiceSettings), role
    return found


def _with_free_port(section: _Listening, role: str, ports: Ports, notes: list[str], *, key: str = "port") -> _Listening:
    wanted = getattr(section, key)
    port = ports.take(section.host, wanted)
    if wanted and port != wanted:
        notes.append(f"port {wanted} is taken: {role} listens on {port} instead")
    return section.model_copy(update={key: port})


def _reachable(host: str) -> str:
    """The address at which this machine reaches a server bound to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
