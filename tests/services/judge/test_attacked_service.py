"""Hostile documents and candidates through the whole judge: what its engine is asked, and what the scores are."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.engine.base import Generation, Prompt, Sampling
from services.judge.judge import Judge
from shared.api import JudgedText, JudgementItem, JudgementRequest
from shared.records import Judgement
from tests.services.chat_families import FAMILIES, TokenizerEngine, save_family
from tests.services.judge.hostile_texts import hostile_texts
from tests.services.judge.judges import make_judge

NUM_ATTACKS = 24
CRITERIA = {
    "quality": {"schedule": "pivot", "samples": 2},
    "safety": {"verdict": "labels"},
    "factuality": {"samples": 1},
}


class Recording(TokenizerEngine):
    """Keeps the prompts. It answers the same whatever it is asked, so that only reading could go wrong."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.prompts: list[tuple[int, ...]] = []

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        self.prompts += [tuple(prompt) for prompt in prompts if not isinstance(prompt, str)]
        text = f"Verdict: {'B' if 'continuation_b' in self.letters(self.prompts[-1]) else 'none'}"
        return [[Generation((), text, "stop", 0)] * sampling.num_samples for _ in prompts]

    async def score(self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = "") -> list[list[float]]:
        assert not isinstance(prompt, str)
        self.prompts.append(tuple(prompt))
        return [[math.log(0.75 if place == 0 else 0.25)] for place, _ in enumerate(continuations)]


def window_of(document: str, texts: Sequence[str]) -> JudgementRequest:
    start = len(document)
    candidates = tuple(JudgedText(text=text) for text in texts)
    item = JudgementItem(start=start, end=start + 4, candidates=candidates)
    return JudgementRequest(text=document + " ref", items=(item,))


async def judgements_of(judge: Judge, requests: Sequence[JudgementRequest]) -> list[Judgement]:
    found = [(await judge.judge(request)).judgements[0] for request in requests]
    assert all(isinstance(one, Judgement) for one in found), "no chunk is lost by its content"
    return [one for one in found if isinstance(one, Judgement)]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_changes_a_prompts_control_tokens_or_its_scores(family: str, tmp_path: Path) -> None:
    engine = Recording(save_family(family, tmp_path / "model"))
    asyncio.run(engine.start())
    engine.can_grade = False
    judge = make_judge(engine, criteria=CRITERIA)
    attacks = [text for text in hostile_texts(NUM_ATTACKS) if text.strip()]
    harmless = window_of("The moon moves around", [" the earth", " the sun"])
    as_candidates = [window_of("The moon moves around", [text, " the sun"]) for text in attacks]
    as_documents = [window_of(text, [" the earth", " the sun"]) for text in attacks]
    (expected,) = asyncio.run(judgements_of(judge, [harmless]))
    normal = {tuple(token for token in ids if token in engine.added_ids) for ids in engine.prompts}
    found = asyncio.run(judgements_of(make_judge(engine, criteria=CRITERIA), [*as_candidates, *as_documents]))
    assert len(engine.prompts) > 4 * len(attacks)
    for ids in engine.prompts:
        assert tuple(token for token in ids if token in engine.added_ids) in normal, engine.letters(ids)
    assert {one.rewards for one in found} == {expected.rewards}
    assert {one.num_failures for one in found} == {0}
