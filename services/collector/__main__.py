"""`python -m services.collector --config FILE [--section.key VALUE ...]`."""

import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from services.serve import run_process

if TYPE_CHECKING:
    from shared.settings import Secrets, Settings


def _work(settings: "Settings", secrets: "Secrets") -> None:
    from services.collector.service import run

    run(settings, secrets)


def _leave(status: int) -> NoReturn:
    """At once: a thread that still waits for a source or for Redis must not hold the process, and an interpreter with
    torch in it (transformers imports it) takes seconds to come down. Everything that must be closed is."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(run_process("collector", _work))
