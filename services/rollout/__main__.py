"""`python -m services.rollout --config FILE [--section.key VALUE ...]`."""

from fastapi import FastAPI

from services.serve import run_service
from shared.settings import Secrets, Settings


def _build(settings: Settings, secrets: Secrets) -> FastAPI:
    from services.rollout.app import build_app

    return build_app(settings, secrets)


if __name__ == "__main__":
    raise SystemExit(run_service("rollout", _build))
