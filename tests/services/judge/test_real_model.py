"""Label scores and likelihoods by a real, tiny model through the transformers engine, against its own logits."""

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.engine.hf.engine import TransformersEngine
from services.judge.likelihood import TokenReading, token_reading
from shared.api import JudgedText, JudgementRequest
from shared.engine_settings import EngineSettings
from shared.records import Judgement
from shared.settings import Settings
from tests.services.judge.judges import TEXTS_ONLY, judgement_of, make_judge, make_window, prompt_file

PREFIX = "The moon moves around"
TEXTS = (" the earth", " bread and apples on", " a river")


def settings_of(model: Path, **judge: Any) -> Settings:
    return Settings.model_validate(
        {"policy": {"model": str(model)}, "judge": {"engine": {"model": str(model)}} | judge}
    )


async def judged(settings: Settings, window: JudgementRequest, reading: TokenReading = TEXTS_ONLY) -> Judgement:
    engine = TransformersEngine(EngineSettings(model=settings.judge.engine.model, device="cpu"))
    await engine.start()
    try:
        judge = make_judge(engine, reading=reading, **settings.judge.model_dump(exclude_none=True))
        return await judgement_of(judge, window)
    finally:
        await engine.close()


def log_probs(model: Path, prompt: list[int], continuation: list[int]) -> list[float]:
    """Of the continuation's tokens, by one plain forward pass."""
    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = network(torch.tensor([prompt + continuation])).logits[0].log_softmax(-1)
    return [float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(continuation)]


@pytest.mark.parametrize("with_tokens", [True, False])
def test_likelihood_is_the_models_own(tiny_model: Path, with_tokens: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = {text: tokenizer.encode(text, add_special_tokens=False) for text in (PREFIX, *TEXTS)}
    window = make_window(*TEXTS, prefix=PREFIX, reference=TEXTS[0])
    settings = settings_of(tiny_model, criteria={"likelihood": {"scale": 0.7}})
    reading = token_reading(settings, "likelihood")
    if with_tokens:
        candidates = tuple(JudgedText(text=text, token_ids=tuple(ids[text])) for text in TEXTS)
        item = window.items[0].model_copy(update={"candidates": candidates, "token_start": len(ids[PREFIX])})
        window = window.model_copy(update={"items": (item,), "token_ids": (*ids[PREFIX], *ids[TEXTS[0]])})
    else:
        reading = dataclasses.replace(reading, shares_policy_tokens=False)
    judgement = asyncio.run(judged(settings, window, reading))
    rows = [log_probs(tiny_model, ids[PREFIX], ids[text]) for text in TEXTS]
    means = [sum(row) / len(row) for row in rows]
    expected = [1 / (1 + math.exp(-(mean - sum(means) / 3) / 0.7)) for mean in means]
    assert judgement.rewards == pytest.approx(expected, abs=1e-4)


def test_label_scores_are_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "A:{a}\nB:{b}\nBetter:")
    settings = settings_of(
        tiny_model, criteria={"quality": {"verdict": "labels", "schedule": "all_pairs", "prompt": path}}
    )
    judgement = asyncio.run(judged(settings, make_window(" x", " y", prefix=PREFIX, reference="")))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def share_of_a(prompt: str) -> float:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        a, b = (
            math.exp(sum(log_probs(tiny_model, ids, tokenizer.encode(label, add_special_tokens=False))))
            for label in (" A", " B")
        )
        return a / (a + b)

    first = (share_of_a("A: x\nB: y\nBetter:") + 1 - share_of_a("A: y\nB: x\nBetter:")) / 2
    assert judgement.rewards == pytest.approx((first, 1 - first), abs=1e-4)


def test_a_tokenizer_is_shared_only_with_an_equal_one(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(["moon"])
    tokenizer.save_pretrained(tmp_path)
    own = settings_of(tiny_model, criteria={"likelihood": {}})
    assert token_reading(own, "likelihood") == TokenReading(shares_policy_tokens=True, beginning=None)
    for other in (str(tmp_path), ""):
        settings = Settings.model_validate(
            {
                "policy": {"model": other},
                "judge": {"criteria": {"likelihood": {}}, "engine": {"model": str(tiny_model)}},
            }
        )
        assert not token_reading(settings, "likelihood").shares_policy_tokens
