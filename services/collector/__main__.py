"""`python -m services.collector --config FILE [--section.key VALUE ...]`."""

import sys
from typing import TYPE_CHECKING

from services.serve import run_process

if TYPE_CHECKING:
    from shared.settings import Secrets, Settings


def _work(settings: "Settings", secrets: "Secrets") -> None:
    from services.collector.service import run

    run(settings, secrets)


if __name__ == "__main__":
    sys.exit(run_process("collector", _work))
