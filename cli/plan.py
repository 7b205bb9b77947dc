"""Decides what a run consists of: which roles, on which ports, with which environment. Used by run and check.

Starts nothing. A service with a `url` runs elsewhere; the judge is needed only by objectives that choose by reward;
rewriter and rollout only if some stage of the schedule makes their kind.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cli.ports import Ports
from cli.redis_server import HOST, redis_url
from shared.configuration import load_secrets, secret_variables
from shared.http import generate_token
from shared.settings import CollectorSettings, Secrets, ServiceSettings, Settings, TrainerSettings

ServiceRole = Literal["rollout", "rewriter", "judge"]
SERVICE_ROLES: tuple[ServiceRole, ...] = ("rollout", "rewriter", "judge")


@dataclass(frozen=True)
class Plan:
    """One start of a run."""

    settings: Settings
    """With the ports that were taken; `redis.url` stays empty when Redis is embedded, since its URL has a password."""
    secrets: Secrets
    roles: tuple[str, ...]
    """What this launcher starts, beside Redis, in the order of starting."""
    embedded_redis_port: int | None
    notes: tuple[str, ...]
    """What a person should know: ports that had to move."""

    @property
    def redis_url(self) -> str:
        if self.embedded_redis_port is None:
            return self.settings.redis.url
        return redis_url(self.embedded_redis_port, self.secrets.token)

    @property
    def num_processes(self) -> int:
        """The launcher itself not counted."""
        return len(self.roles) + (self.embedded_redis_port is not None)

    def ready_url(self, role: str) -> str | None:
        """Where the role says that it is ready; None for the trainer, which serves no requests."""
        if role == "trainer":
            return None
        if role == "collector":
            return f"{self.collector_url}/readyz"
        return f"http://{_reachable(self.service(role).host)}:{self.service(role).port}/readyz"

    @property
    def collector_url(self) -> str:
        collector = self.settings.collector
        return f"http://{_reachable(collector.host)}:{collector.port}"

    def service(self, role: str) -> ServiceSettings:
        return service_settings(self.settings, role)

    def command(self, role: str) -> list[str]:
        """How the role is started; its settings are in the run folder."""
        module = "trainer" if role == "trainer" else f"services.{role}"
        return [sys.executable, "-m", module, "--config", str(self.settings.run.folder / "processes.toml")]

    def environ(self) -> dict[str, str]:
        """The children's environment. What is secret in a setting travels here, since their file has none of it."""
        return (
            child_environ()
            | secret_variables(self.settings)
            | {
                "HEADWATER_TOKEN": self.secrets.token,
                "HEADWATER_REDIS__URL": self.redis_url,
            }
        )


def child_environ() -> dict[str, str]:
    """This process's environment without HEADWATER_*: those settings are in the children's file already, and must
    not override the ports in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}


def make_plan(settings: Settings, ports: Ports, *, environ: Mapping[str, str] | None = None) -> Plan:
    """Take ports and tokens for everything that `settings` needs on this machine."""
    secrets = _complete(load_secrets(os.environ if environ is None else environ))
    services = [role for role in needed_services(settings) if not service_settings(settings, role).url]
    notes: list[str] = []
    updates: dict[str, object] = {}
    for role in services:
        updates[role] = _with_free_port(service_settings(settings, role), role, ports, notes)
    updates["collector"] = _with_free_port(settings.collector, "collector", ports, notes)
    if settings.trainer.metrics_port:
        updates["trainer"] = _with_free_metrics_port(settings.trainer, ports, notes)
    return Plan(
        settings=settings.model_copy(update=updates),
        secrets=secrets,
        roles=(*services, "collector", "trainer"),
        embedded_redis_port=None if settings.redis.url else ports.take(HOST, 0),
        notes=tuple(notes),
    )


def needed_services(settings: Settings) -> list[ServiceRole]:
    """Services that the collector will call, wherever they run."""
    wanted = {
        "rollout": "rollout" in settings.kinds,
        "rewriter": "rewrite" in settings.kinds,
        "judge": settings.needs_judge,
    }
    return [role for role in SERVICE_ROLES if wanted[role]]


def service_settings(settings: Settings, role: str) -> ServiceSettings:
    found = getattr(settings, role)
    assert isinstance(found, ServiceSettings), role
    return found


def _complete(given: Secrets) -> Secrets:
    return Secrets(token=given.token or generate_token())


def _with_free_port(
    section: ServiceSettings | CollectorSettings, role: str, ports: Ports, notes: list[str]
) -> ServiceSettings | CollectorSettings:
    return section.model_copy(update={"port": _take(section.host, section.port, role, ports, notes)})


def _with_free_metrics_port(trainer: TrainerSettings, ports: Ports, notes: list[str]) -> TrainerSettings:
    port = _take(trainer.host, trainer.metrics_port, "trainer", ports, notes)
    return trainer.model_copy(update={"metrics_port": port})


def _take(host: str, wanted: int, role: str, ports: Ports, notes: list[str]) -> int:
    port = ports.take(host, wanted)
    if wanted and port != wanted:
        notes.append(f"port {wanted} is taken: {role} listens on {port} instead")
    return port


def _reachable(host: str) -> str:
    """Where this machine reaches a server that binds to `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
