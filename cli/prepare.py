"""`headwater prepare`: Prepare run folder and database for processes started one by one (compose, Kubernetes).

The same as `headwater run` does before its first process. Running it again changes nothing.
"""

from cli.run_folder import ConfigFile, Overrides, RunFolder
from shared.configuration import load_settings, without_passwords
from shared.database import migrate, open_database
from shared.ledger import Ledger


def prepare(config: ConfigFile, overrides: Overrides) -> int:
    """SettingsError when the settings belong to another run of that name."""
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
