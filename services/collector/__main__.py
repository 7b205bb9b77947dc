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
    """At once: threads that still wait for a source or for Redis would hold the process, and an interpreter with torch
    in it (some tokenizers need transformers) takes seconds to exit. Everything that must be closed is."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(run_process("collector", _work))
