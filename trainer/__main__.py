"""`python -m trainer --config FILE [--section.key VALUE ...]`: one trainer process until its run ends.

Exits 0 when the run is finished or when SIGTERM or SIGINT asked it to stop (a checkpoint is written first), and 1 with
one error line when it can't go on.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path
from threading import Event

from shared.configuration import load_settings
from shared.errors import HeadwaterError
from shared.logs import configure_logs

_log = logging.getLogger("trainer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, help="TOML file; every key can be overridden by --section.key VALUE")
    arguments, overrides = parser.parse_known_args()
    configure_logs("trainer")
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        settings = load_settings(arguments.config, overrides)
        from trainer.assembly import train  # torch loads only once the settings are known to be good

        train(settings, stop)
    except HeadwaterError as exc:
        _log.error("%s: %s", type(exc).__name__, exc)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
