"""Judges over the fake engine, and the windows that they judge."""

from pathlib import Path
from typing import Any

from services.engine.base import Engine
from services.judge.build import build_judge, load_parts
from services.judge.judge import Judge
from services.judge.likelihood import TokenReading
from shared.api import JudgedText, JudgementFailure, JudgementItem, JudgementRequest
from shared.records import Judgement
from shared.settings import JudgeSettings

TEXTS_ONLY = TokenReading(shares_policy_tokens=False, beginning=None)


def make_judge(engine: Engine, /, *, reading: TokenReading | None = TEXTS_ONLY, **settings: Any) -> Judge:
    parsed = JudgeSettings.model_validate(settings)
    return build_judge(parsed, load_parts(parsed), engine=engine, reading=reading)


def prompt_file(folder: Path, text: str) -> str:
    path = folder / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def make_window(*texts: str, prefix: str = "The prefix", reference: str = " ref") -> JudgementRequest:
    """A window that ends with its one chunk."""
    candidates = tuple(JudgedText(text=text) for text in texts)
    item = JudgementItem(start=len(prefix), end=len(prefix) + len(reference), candidates=candidates)
    return JudgementRequest(text=prefix + reference, items=(item,))


async def judge_one(judge: Judge, window: JudgementRequest, *, seed: int = 0) -> Judgement | JudgementFailure:
    return (await judge.judge(window.model_copy(update={"seed": seed}))).judgements[0]


async def judgement_of(judge: Judge, window: JudgementRequest, *, seed: int = 0) -> Judgement:
    judgement = await judge_one(judge, window, seed=seed)
    assert isinstance(judgement, Judgement), judgement
    return judgement


async def failure_of(judge: Judge, window: JudgementRequest) -> JudgementFailure:
    failure = await judge_one(judge, window)
    assert isinstance(failure, JudgementFailure), failure
    return failure
