"""Stands in for an engine where no criterion needs one (`python` alone): nothing is loaded, nothing can be asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from services.engine.base import Generation, Prompt, Sampling, TokenSequence
from shared.errors import EngineError


class NoEngine:
    """See `Engine`."""

    name = "none"
    weight_version = 0
    can_score = False
    can_constrain = False
    has_chat_template = False

    async def start(self) -> None:
        return

    async def close(self) -> None:
        return

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self._refuse()

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[list[float]]:
        self._refuse()

    def encode(self, text: str) -> list[int]:
        self._refuse()

    def decode(self, token_ids: TokenSequence) -> str:
        self._refuse()

    def render_chat(self, prompt: str) -> str:
        self._refuse()

    async def load_weights(self, folder: Path, version: int) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise EngineError("this judge has no model: its only criterion is a python function")
