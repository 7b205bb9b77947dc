"""`python -m services.rewriter --config FILE [--section.key VALUE ...]`."""

import sys
from typing import TYPE_CHECKING

from services.serve import run_service

if TYPE_CHECKING:
    from fastapi import FastAPI

    from shared.settings import Secrets, Settings


def _build(settings: "Settings", secrets: "Secrets") -> "FastAPI":
    from services.rewriter.app import build_app

    return build_app(settings, secrets)


if __name__ == "__main__":
    sys.exit(run_service("rewriter", _build))
