"""`headwater prepare`: makes a run ready for processes that are started one by one, by compose or Kubernetes.

What `headwater run` does before its first process: the run folder with its settings, the database's schema, the run's
row. Doing it again changes nothing, and refuses settings that belong to another run.
"""

from collections.abc import Sequence
from pathlib import Path

from cli.run_folder import RunFolder
from shared.configuration import load_settings, without_passwords
from shared.database import migrate, open_database
from shared.ledger import Ledger


def prepare(config: Path, overrides: Sequence[str]) -> int:
    """Exit code 0, or an error."""
    settings = load_settings(config, overrides)
    folder = RunFolder(settings.run.folder)
    with folder.locked():
        folder.adopt(settings)
    engine = open_database(settings.database_url)
    try:
        migrate(engine)
        Ledger(engine, settings.run.name).open_run(without_passwords(settings).model_dump(mode="json"))
    finally:
        engine.dispose()
    name, file = settings.run.name, folder.settings_file
    print(f"run {name} is prepared: settings in {file}, {engine.dialect.name} at its newest schema")
    return 0
