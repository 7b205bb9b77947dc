"""The run folder, and the arguments by which commands name a run.

settings.toml    the resolved settings of the newest start
processes.toml   the same with the ports in use; the processes read this one
checkpoints/ weights/ replicas/ headwater.db redis/ logs/ROLE.log report/
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.configuration import load_settings, read_toml, without_passwords, write_settings
from shared.errors import SettingsError
from shared.identity import form_of, refuse_changed_identity, refuse_other_form
from shared.settings import Settings

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the run.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or the run's name under runs/.")]


def _overrides(context: typer.Context) -> list[str]:
    """main.py has taken them out of the line."""
    found: list[str] = context.obj
    return found


_OVERRIDE = "Override any setting, e.g. --trainer.steps 200. Can be repeated."
Overrides = Annotated[
    list[str],
    typer.Option(
        "--section.key", metavar="VALUE", help=_OVERRIDE, callback=_overrides, default_factory=list, show_default=False
    ),
]


@dataclass
class RunFolder:
    path: Path

    def __post_init__(self) -> None:
        self.settings_file = self.path / "settings.toml"
        self.processes_file = self.path / "processes.toml"
        self.checkpoints, self.redis, self.report = (self.path / name for name in ("checkpoints", "redis", "report"))

    def log(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.log"

    def create(self) -> None:
        for name in ("checkpoints", "weights", "redis", "logs", "report"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder until the process ends. SettingsError if another launcher holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise SettingsError(
                    f"another `headwater run` is working in {self.path}: stop it, or give this run another name "
                    "(--run.name NAME)"
                ) from exc
            yield

    def read_settings(self) -> dict[str, Any]:
        """As they were written down. SettingsError if a run of another form did."""
        found = read_toml(self.settings_file)
        refuse_other_form(form_of(found), run=found.get("run", {}).get("name", self.path.name))
        return found

    def refuse_another_run(self, settings: Settings) -> None:
        """SettingsError if the folder belongs to a run with another identity."""
        if self.settings_file.exists():
            old, new = self.read_settings(), without_passwords(settings).model_dump(mode="json")
            refuse_changed_identity(old, new, run=f"in {self.path}")

    def adopt(self, settings: Settings) -> None:
        """Write `settings`, without passwords, into the folder. SettingsError if it belongs to another run."""
        self.refuse_another_run(settings)
        write_settings(without_passwords(settings), self.settings_file)


_STORES = {"HEADWATER_REDIS__URL": "redis", "HEADWATER_DATABASE__URL": "database"}
"""Their URLs may contain passwords, which the run folder does not keep."""


def find_run(name: str, environ: Mapping[str, str] | None = None) -> tuple[RunFolder, Settings]:
    """An existing run, by folder or by name under runs/. An embedded database is looked for in that folder. The URLs
    of an external Redis or database are taken from the environment if it has them."""
    given = os.environ if environ is None else environ
    candidates = [Path(name), Path("runs") / name]
    for path in candidates:
        folder = RunFolder(path)
        if folder.settings_file.exists():
            folder.read_settings()
            return folder, _reachable(load_settings(folder.settings_file, environ={}), path, given)
    tried = " or ".join(str(path / "settings.toml") for path in candidates)
    raise SettingsError(f"no run {name!r}: there is no {tried}")


def _reachable(settings: Settings, path: Path, environ: Mapping[str, str]) -> Settings:
    """With URLs that hold here. Embedded stores lie in `path`: the folder may have moved, or the working directory may
    differ."""
    embedded = {"redis": "", "database": f"sqlite:///{path / 'headwater.db'}"}
    updates: dict[str, object] = {}
    for variable, name in _STORES.items():
        section = getattr(settings, name)
        url = environ.get(variable, section.url) if section.url else embedded[name]
        updates[name] = section.model_copy(update={"url": url})
    weights = settings.weights.model_copy(update={"store": settings.weights.store or str(path / "weights")})
    return settings.model_copy(update={**updates, "weights": weights})
