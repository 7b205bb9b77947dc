"""`python -m trainer --config FILE [--section.key VALUE ...]`: one trainer process until its run ends.

Exits 0 when the run is finished or when SIGTERM or SIGINT asked it to stop (a checkpoint is written first), and 1 with
one error line when it can't go on.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event

from shared.configuration import load_secrets, load_settings
from shared.errors import HeadwaterError, SettingsError
from shared.process import configure_logs
from shared.settings import Settings
from trainer.metrics_server import serving_metrics

_log = logging.getLogger("trainer")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, help="TOML file; every key can be overridden by --section.key VALUE")
    arguments, overrides = parser.parse_known_args()
    configure_logs("trainer")
    stop = Event()
    _on_signal(lambda: sys.exit(0))  # until training begins there is nothing to save
    try:
        settings = load_settings(arguments.config, overrides)
        _check(settings)
        with serving_metrics(settings.trainer.host, settings.trainer.metrics_port, load_secrets()):
            from trainer.assembly import train  # torch loads only once the settings are known to be good

            _on_signal(stop.set)
            train(settings, stop)
    except HeadwaterError as exc:
        _log.error("%s: %s", type(exc).__name__, exc)
        return 1
    return 0


def _on_signal(react: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: react())


def _check(settings: Settings) -> None:
    """What may stay empty elsewhere, but not for the trainer."""
    if not settings.redis.url:
        raise SettingsError("redis.url is empty: start through `headwater run`, or give --redis.url redis://HOST:PORT")
    if not settings.policy.model:
        raise SettingsError("policy.model is empty: name a Hugging Face folder or model to start from")
    num_processes = os.environ.get("WORLD_SIZE", "1")  # set by torchrun
    if num_processes != "1":
        # each of them would read the stream and publish weights as if it were alone
        raise SettingsError(
            f"torchrun started {num_processes} trainer processes, but the trainer is one process on one device: "
            "give torchrun --nnodes 1 --nproc-per-node 1"
        )


if __name__ == "__main__":
    sys.exit(main())
