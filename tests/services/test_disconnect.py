"""A caller that hangs up takes its work out of the engine, on every service that keeps one busy."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.engine.base import Generation, Prompt, Sampling
from services.judge import app as judge
from services.rewriter import app as rewriter
from services.rollout import app as rollout
from shared.settings import Secrets, Settings
from tests.services.fakes import FakeEngine
from tests.services.serving import running

SECRETS = Secrets(token="t0ken")
HEADERS = {"Authorization": "Bearer t0ken"}
PLACE = {"start": 3, "end": 8}
ROLLOUTS = {"token_ids": list(range(1, 40)), "starts": [16], "num_rollouts": 1, "max_suffix_tokens": 8}
REWRITES = {"text": "The moon", "items": [PLACE | {"max_suffix_tokens": 8}]}
JUDGEMENTS = {"text": "The moon", "items": [{**PLACE, "candidates": [{"text": " moon"}, {"text": " sun"}]}]}
CASES: dict[str, tuple[Callable[..., FastAPI], str, dict[str, Any]]] = {
    "rollout": (rollout.build_app, "/v1/rollouts", ROLLOUTS),
    "rewriter": (rewriter.build_app, "/v1/rewrites", REWRITES),
    "judge": (judge.build_app, "/v1/judgements", JUDGEMENTS),
}


@dataclass
class EndlessEngine(FakeEngine):
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.left.set()
            raise
        raise AssertionError("nobody gave up")


@pytest.mark.parametrize("service", CASES)
def test_hanging_up_cancels_the_work(service: str, tiny_model: Path, tmp_path: Path) -> None:
    build_app, path, body = CASES[service]
    settings = Settings.model_validate({"policy": {"model": str(tiny_model)}, "run": {"directory": str(tmp_path)}})
    engine = EndlessEngine()
    with running(build_app(settings, SECRETS, engine=engine)) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{path}", json=body, headers=HEADERS, timeout=httpx.Timeout(10, read=1.0))
        assert engine.asked.wait(5)
        assert engine.left.wait(5)
