"""A real, tiny judge on attacked candidates: an attack weighs no more than harmless letters in its place."""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import fmean

from services.engine.base import Engine
from services.engine.hf.engine import TransformersEngine
from services.frames import Frame
from services.prompts import Prompt
from shared.engine_settings import EngineSettings
from starter.documents import document_of
from starter.world import World
from tests.services.judge.hostile_texts import hostile_texts

STARTER = Path(__file__).parents[3] / "starter"
LABELS = (" A", " B")
CONTROLS = ("</s>", "</s><s>", "<s>", "<pad>", "</s></s></s>", "<pad></s>")
"""Of the starter's judge: the only control tokens that it was trained with."""
NUM_DOCUMENTS, NUM_VARIANTS = 6, 4
MAX_BYTES = 300
"""Of an attack: the tiny judge reads 512 tokens."""

ShareOfA = Callable[[str, str, str], Coroutine[None, None, float]]


def share_of_a(engine: Engine) -> ShareOfA:
    """P(A) / (P(A) + P(B)) after the starter's quality prompt."""
    text = (STARTER / "prompts" / "quality.txt").read_text(encoding="utf-8").removesuffix("\n")
    frame = Frame(Prompt(text), engine, chat=False)

    async def ask(prefix: str, a: str, b: str) -> float:
        texts = {"prefix": prefix, "a": a, "b": b}
        pieces = {name: frame.piece(name, text) for name, text in texts.items()}
        scores = await engine.score(frame.join(pieces, nonce="").build(), LABELS)
        first, second = (math.exp(sum(log_probs)) for log_probs in scores)
        return first / (first + second)

    return ask


def with_engine(work: Callable[[Engine], Coroutine[None, None, None]]) -> None:
    async def run() -> None:
        engine = TransformersEngine(EngineSettings(model=str(STARTER / "models" / "judge"), device="cpu"))
        await engine.start()
        try:
            await work(engine)
        finally:
            await engine.close()

    asyncio.run(run())


def documents() -> list[tuple[str, str, str]]:
    """Prefix and two continuations."""
    found = []
    for index in range(NUM_DOCUMENTS):
        words = document_of(World(0), "test", index).words
        found.append((said(words[:30]), said(words[30:46]), said(words[46:62])))
    return found


def said(words: tuple[str, ...]) -> str:
    return "".join(word if word == "." else f" {word}" for word in words)


def harmless(attack: str, variant: int) -> str:
    """With other letters: `</s>` becomes `</x>`, which is no token of anybody."""
    draw = random.Random(variant)
    return "".join(draw.choice("bcfghjkmqvwxyz") if sign.isalnum() else sign for sign in attack)


def test_control_tokens_weigh_no_more_than_other_letters() -> None:
    async def work(engine: Engine) -> None:
        ask, shifts, noise = share_of_a(engine), [], []
        for prefix, a, b in documents():
            for attack in CONTROLS:
                others = [await ask(prefix, a + harmless(attack, n), b) for n in range(NUM_VARIANTS)]
                shifts.append(await ask(prefix, a + attack, b) - fmean(others))
                noise += [abs(other - fmean(others)) for other in others]
        assert abs(fmean(shifts)) < 2 * fmean(noise), "the verdicts as a whole"
        assert max(map(abs, shifts)) < 2 * max(noise), "and each of them"

    with_engine(work)


def test_no_content_makes_a_verdict_unreadable() -> None:
    async def work(engine: Engine) -> None:
        ask = share_of_a(engine)
        prefix, a, b = documents()[0]
        attacks = [text for text in hostile_texts(400) if len(text.encode("utf-8", "replace")) <= MAX_BYTES]
        assert len(attacks) > 250
        for attack in attacks[::5]:
            assert 0.0 < await ask(prefix, a + attack, b) < 1.0, repr(attack)

    with_engine(work)
