"""Judges over the fake engine, and the windows that they judge."""

import asyncio
from pathlib import Path
from typing import Any

from services.engine.base import Engine
from services.judge.build import build_judge, load_parts
from services.judge.criteria import JudgedChunk
from services.judge.engines import JudgeEngines
from services.judge.judge import Judge
from services.judge.likelihood import TokenReading
from shared.api import JudgedText, JudgementFailure, JudgementItem, JudgementRequest
from shared.judge_settings import JudgeSettings
from shared.records import Judgement
from tests.services.fakes import FakeEngine

TEXTS_ONLY = TokenReading(shares_policy_tokens=False, beginning=None)


def answering(text: str, **options: Any) -> FakeEngine:
    return FakeEngine(answer=lambda prompt, index: text, **options)


def make_judge(engine: Engine, /, *, reading: TokenReading = TEXTS_ONLY, **settings: Any) -> Judge:
    parsed = JudgeSettings.model_validate({"engine_patience_s": 0} | settings)
    engines = JudgeEngines.of(parsed, replacement=engine)
    readings = {name: reading for name in parsed.criteria if parsed.kind(name) == "likelihood"}
    return build_judge(parsed, load_parts(parsed), engines=engines.by_criterion, readings=readings, classifiers={})


def prompt_file(folder: Path, text: str) -> str:
    path = folder / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def make_window(*texts: str, prefix: str = "The prefix", reference: str = " ref") -> JudgementRequest:
    """A window that ends with its one chunk."""
    candidates = tuple(JudgedText(text=text) for text in texts)
    item = JudgementItem(start=len(prefix), end=len(prefix) + len(reference), candidates=candidates)
    return JudgementRequest(text=prefix + reference, items=(item,))


def chunk_of(window: JudgementRequest) -> JudgedChunk:
    """The window's first chunk, as the judge hands it to its criteria."""
    return JudgedChunk(window, window.items[0], turn=0, nonce="lamod")


async def judgement_of(judge: Judge, window: JudgementRequest) -> Judgement:
    (judgement,) = (await judge.judge(window)).judgements
    assert isinstance(judgement, Judgement), judgement
    return judgement


def judged(engine: Engine, window: JudgementRequest, /, **settings: Any) -> Judgement:
    """The window's one chunk, judged with `settings` (and `reading`)."""
    return asyncio.run(judgement_of(make_judge(engine, **settings), window))


def failed(engine: Engine, window: JudgementRequest, /, **settings: Any) -> JudgementFailure:
    (failure,) = asyncio.run(make_judge(engine, **settings).judge(window)).judgements
    assert isinstance(failure, JudgementFailure), failure
    return failure
