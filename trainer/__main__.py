"""`python -m trainer --config FILE [--section.key VALUE ...]`: a trainer until its run ends, alone or under torchrun.

Exits 0 when the run is finished or SIGTERM or SIGINT asked it to stop (a checkpoint is written first), and 1 with one
error line when training can't continue.
"""

import os
import sys
from threading import Event

from shared.errors import SettingsError
from shared.http import serving_metrics
from shared.process import on_stop_signal, run_process
from shared.redis import require_url
from shared.settings import Secrets, Settings


def _work(settings: Settings, secrets: Secrets) -> None:
    _check(settings)
    is_main = os.environ.get("RANK", "0") == "0"  # set by torchrun
    port = settings.trainer.metrics_port if is_main else 0
    with serving_metrics("trainer", settings.trainer.host, port, secrets):
        from trainer.assembly import train  # torch loads only once the settings are known to be good

        stop = Event()
        on_stop_signal(lambda *_: stop.set())  # until here there is nothing to save
        train(settings, stop)


def _check(settings: Settings) -> None:
    require_url(settings.redis)
    if not settings.policy.model:
        raise SettingsError("policy.model is empty: name a Hugging Face folder or model to start from")


if __name__ == "__main__":
    sys.exit(run_process("trainer", _work, command="python -m trainer"))
