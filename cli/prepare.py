"""`headwater prepare`: Prepare run folder and database for processes started one by one (compose, Kubernetes).

The same as `headwater run` does before its first process. Running it again changes nothing.
"""

from cli.run_folder import ConfigFile, Overrides, RunFolder
from shared.configuration import load_settings
from shared.runs import open_run


def prepare(config: ConfigFile, overrides: Overrides) -> int:
    """SettingsError when the settings belong to another run of that name."""
    settings = load_settings(config, overrides)
    folder = RunFolder(settings.run.folder)
    with folder.locked():
        folder.adopt(settings)
    run = open_run(settings)
    run.close()
    print(
        f"run {run.name} is prepared: settings in {folder.settings_file}, "
        f"{run.database.dialect.name} at its newest schema"
    )
    return 0
