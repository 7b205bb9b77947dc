"""`headwater prepare`: makes a run ready for processes that are started one by one, by compose or Kubernetes.

What `headwater run` does before its first process: the run folder with its settings, the database's schema, the run's
row. Doing it again changes nothing, and refuses settings that belong to another run.
"""

from collections.abc import Sequence
from pathlib import Path

from cli.run_folder import RunFolder
from shared.configuration import load_settings
from shared.runs import open_run


def prepare(config: Path, overrides: Sequence[str]) -> int:
    """Exit code 0, or an error."""
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
