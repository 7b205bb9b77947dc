"""`headwater check`."""

from collections.abc import Sequence
from pathlib import Path

from shared.configuration import load_settings


def check(config: Path, overrides: Sequence[str]) -> int:
    """Validate."""
    load_settings(config, overrides)
    return 0
