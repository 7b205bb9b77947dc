"""Writes the rollout service's events into the run's database; its trouble never becomes the service's."""

import logging
from typing import Any

from shared.configuration import without_passwords
from shared.database import migrate, open_database
from shared.errors import DatabaseError, SettingsError
from shared.ledger import Ledger
from shared.settings import Settings

_log = logging.getLogger(__name__)


class RunEvents:
    """Opens the database at the first event. Blocking."""

    def __init__(self, settings: Settings, *, role: str) -> None:
        self._settings = settings
        self._role = role
        self._ledger: Ledger | None = None

    def record(self, kind: str, message: str, **data: Any) -> None:
        """A database that is away, or that has the run with another identity, costs the event, not the service: the
        log has it too."""
        try:
            if self._ledger is None:
                self._ledger = self._open()
            self._ledger.record_event(self._role, kind, message, **data)
        except (DatabaseError, SettingsError) as exc:
            _log.warning("event %s is not in the database: %s", kind, exc)

    def _open(self) -> Ledger:
        engine = open_database(self._settings.database_url)
        migrate(engine)
        ledger = Ledger(engine, self._settings.run.name)
        ledger.open_run(without_passwords(self._settings).model_dump(mode="json"))
        return ledger
