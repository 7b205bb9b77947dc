"""The run folder: where it lies, what is in it, who may write to it, and whether a configuration belongs to it.

settings.toml    the resolved settings of the newest start
processes.toml   the same with the ports that were really taken: what the processes are given
checkpoints/ weights/ replicas/ headwater.db redis/ logs/ROLE.log report/
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.configuration import load_settings, read_toml, without_passwords, write_settings
from shared.errors import SettingsError
from shared.identity import form_of, refuse_changed_identity, refuse_other_form
from shared.settings import Settings


@dataclass(frozen=True)
class RunFolder:
    """Places in one run's folder."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.toml"

    @property
    def processes_file(self) -> Path:
        return self.path / "processes.toml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def redis(self) -> Path:
        return self.path / "redis"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def log(self, role: str) -> Path:
        return self.path / "logs" / f"{role}.log"

    def create(self) -> None:
        for name in ("checkpoints", "weights", "redis", "logs", "report"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; SettingsError if another launcher has it. The lock ends with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise SettingsError(
                    f"another `headwater run` is working in {self.path}: stop it, or give this run a name of its own "
                    "(--run.name NAME)"
                ) from exc
            yield

    def read_settings(self) -> dict[str, Any]:
        """As they were written down. SettingsError if a run of another form did."""
        found = read_toml(self.settings_file)
        refuse_other_form(form_of(found), run=found.get("run", {}).get("name", self.path.name))
        return found

    def refuse_another_run(self, settings: Settings) -> None:
        """SettingsError if the folder belongs to a run of another identity."""
        if self.settings_file.exists():
            old, new = self.read_settings(), without_passwords(settings).model_dump(mode="json")
            refuse_changed_identity(old, new, run=f"in {self.path}")

    def adopt(self, settings: Settings) -> None:
        """Write `settings` as the run's own, unless the folder belongs to a run of another identity. Passwords stay
        out."""
        self.refuse_another_run(settings)
        write_settings(without_passwords(settings), self.settings_file)


_STORES = {"HEADWATER_REDIS__URL": "redis", "HEADWATER_DATABASE__URL": "database"}
"""Their URLs may hold passwords, which the run folder doesn't have."""


def find_run(name: str, environ: Mapping[str, str] | None = None) -> tuple[RunFolder, Settings]:
    """An existing run by folder, or by name under runs/. The database URL is made to point into the folder found; a
    run on a Redis or database of its own takes their URLs from the environment, where it has them."""
    given = os.environ if environ is None else environ
    candidates = [Path(name), Path("runs") / name]
    for path in candidates:
        folder = RunFolder(path)
        if folder.settings_file.exists():
            folder.read_settings()
            return folder, _settled_in(path, _reaching_stores(load_settings(folder.settings_file, environ={}), given))
    tried = " or ".join(str(path / "settings.toml") for path in candidates)
    raise SettingsError(f"no run {name!r}: there is no {tried}")


def _reaching_stores(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """What a run had embedded stays embedded."""
    updates: dict[str, object] = {}
    for variable, name in _STORES.items():
        section = getattr(settings, name)
        if section.url and variable in environ:
            updates[name] = section.model_copy(update={"url": environ[variable]})
    return settings.model_copy(update=updates)


def _settled_in(path: Path, settings: Settings) -> Settings:
    """The folder may have been moved, or be seen from another working directory."""
    database = settings.database.url or f"sqlite:///{path / 'headwater.db'}"
    store = settings.weights.store or str(path / "weights")
    return settings.model_copy(
        update={
            "database": settings.database.model_copy(update={"url": database}),
            "weights": settings.weights.model_copy(update={"store": store}),
        }
    )
