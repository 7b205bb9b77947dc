"""Prompts, and sources of verdicts, at the seam between criteria and engine."""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

from services.engine.base import Engine, Prompt
from services.judge.asker import Asker
from services.judge.verdict_memory import VerdictMemory
from services.judge.verdicts import Answers, AnswerVerdict, CallCount, VerdictSource
from shared.judge_settings import CriterionSettings

SAFETY = {"safe": 1.0, "unsafe": 0.0}


@dataclass
class Asked:
    """A prompt as the criteria join it."""

    text: str
    num_built: int = 0

    @property
    def key(self) -> bytes:
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()

    def build(self) -> Prompt:
        self.num_built += 1
        return self.text


def make_asker(engine: Engine) -> Asker:
    return Asker(engine, max_at_once=100, patience_s=0.0)


def answer_verdict(
    engine: Engine,
    /,
    verdicts: dict[str, float] = SAFETY,
    *,
    memory: VerdictMemory | None = None,
    max_retries: int = 0,
    thinking_end: str = "</think>",
    **settings: Any,
) -> AnswerVerdict:
    criterion = CriterionSettings.model_validate(settings)
    kept = VerdictMemory(100) if memory is None else memory
    return AnswerVerdict(make_asker(engine), kept, criterion, verdicts, max_retries, thinking_end=thinking_end)


def ask(
    source: VerdictSource,
    *,
    num_samples: int = 1,
    text: str = "Is it safe?",
    count: CallCount | None = None,
    seed: int = 7,
) -> Answers:
    """In an event loop of its own."""
    counted = count or CallCount("safety")
    return asyncio.run(source.ask(Asked(text), num_samples=num_samples, seed=seed, count=counted, turn=0))
