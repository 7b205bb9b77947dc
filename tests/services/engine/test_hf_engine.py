"""The engine that runs a model in this process, on a tiny random Llama, beyond the contract of every engine."""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from services.engine.base import Generation, Sampling, Tokens
from services.engine.hf.engine import TransformersEngine
from services.engine.hf.model import CausalModel
from services.engine.hf.prefill import PrefilledPrompt
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, PromptError
from tests.vllm.reference import log_probs

T = TypeVar("T")

PROMPT = [52, 258, 297, 263]
OTHERS = [[5, 6], [9] * 40, [17, 18, 19], [200, 4, 100, 80, 41]]
DOCUMENT = list(range(20, 80))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 60))


@contextmanager
def started(model: Path, **settings: object) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(EngineSettings.model_validate({"model": str(model), "device": "cpu"} | settings))
    run(engine.start())
    try:
        yield engine
    finally:
        run(engine.close())


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[TransformersEngine]:
    with started(tiny_model) as engine:
        yield engine


@pytest.fixture(scope="module")
def patient(tiny_model: Path) -> Iterator[TransformersEngine]:
    """Waits until all requests of a test are there, and batches them."""
    with started(tiny_model, batch_wait_s=0.2) as engine:
        yield engine


def tokens(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in generations]


@asynccontextmanager
async def prefilling(num_tokens: int) -> AsyncIterator[None]:
    """Checks that this many tokens of prompts are computed inside."""
    before = metrics.REGISTRY.get_sample_value("headwater_engine_prompt_tokens_total") or 0.0
    yield
    assert metrics.REGISTRY.get_sample_value("headwater_engine_prompt_tokens_total") == before + num_tokens


def check_scores(model: Path, prompt: Sequence[int], continuations: list[list[int]], scores: list[list[float]]) -> None:
    for continuation, given in zip(continuations, scores, strict=True):
        assert given == pytest.approx(log_probs(model, prompt, continuation), abs=1e-4)


def test_other_requests_in_the_batch_do_not_change_answers(patient: TransformersEngine) -> None:
    sampling = Sampling(max_tokens=24, num_samples=3, temperature=0.9, top_p=0.8, seed=7)

    async def work() -> None:
        (alone,) = await patient.generate([PROMPT], sampling)
        others = [
            patient.generate([other], Sampling(max_tokens=5 + 9 * i, num_samples=1 + i, temperature=i / 2, seed=i))
            for i, other in enumerate(OTHERS)
        ]
        (together,), *_ = await asyncio.gather(patient.generate([PROMPT], sampling), *others)
        assert tokens(together) == tokens(alone)
        assert len(set(tokens(alone))) == 3

    run(work())


def test_rows_split_over_several_batches_give_the_same_answers(engine: TransformersEngine, tiny_model: Path) -> None:
    sampling = Sampling(max_tokens=16, num_samples=4, seed=3)
    with started(tiny_model, max_batch_tokens=64) as narrow:
        assert run(narrow.generate([PROMPT, *OTHERS], sampling)) == run(engine.generate([PROMPT, *OTHERS], sampling))


def test_sampled_shares_follow_the_models_probabilities(engine: TransformersEngine, tiny_model: Path) -> None:
    (generations,) = run(engine.generate([PROMPT], Sampling(max_tokens=1, num_samples=4000, seed=1)))
    for token, count in Counter(generation.token_ids[0] for generation in generations).most_common(5):
        expected = math.exp(log_probs(tiny_model, PROMPT, [token])[0])
        assert count / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))


def test_chunks_share_one_prefill_and_continue_as_if_each_had_its_own(engine: TransformersEngine) -> None:
    async def work() -> None:
        prompts = [DOCUMENT[:start] for start in (16, 32, 60)]
        async with prefilling(60):
            await engine.generate(prompts, Sampling(max_tokens=4, num_samples=8))
        greedy = Sampling(max_tokens=8, temperature=0)
        together = await engine.generate(prompts, greedy)
        assert [await engine.generate([prompt], greedy) for prompt in prompts] == [[of_one] for of_one in together]

    run(work())


def test_concurrent_scores_share_batches_and_stay_right(patient: TransformersEngine, tiny_model: Path) -> None:
    requests = [(DOCUMENT[:n], [[n], [n, n + 1]]) for n in (5, 20, 60)] + [(other, [[3]]) for other in OTHERS]

    async def work() -> list[list[list[float]]]:
        return await asyncio.gather(*(patient.score(prompt, given) for prompt, given in requests))

    for (prompt, continuations), scores in zip(requests, run(work()), strict=True):
        check_scores(tiny_model, prompt, continuations, scores)


def test_questions_that_begin_alike_run_what_they_share_once(patient: TransformersEngine, tiny_model: Path) -> None:
    document, candidates = list(range(20, 90)), [[n] * 40 + [n + 1, 3] for n in (100, 120, 140, 160)]
    prompts = [document + a + b for a in candidates for b in candidates if a != b] + [document[:30]]

    async def work() -> list[list[list[float]]]:
        # the document, four candidates after it, and twelve after those; then one more token of [6, 7] each
        async with prefilling(70 + 4 * 42 + 12 * 42 + len(prompts)):
            return await asyncio.gather(*(patient.score(prompt, [[5], [6, 7]]) for prompt in prompts))

    for prompt, scores in zip(prompts, run(work()), strict=True):
        check_scores(tiny_model, prompt, [[5], [6, 7]], scores)


def test_texts_are_encoded_without_special_tokens(engine: TransformersEngine) -> None:
    assert engine.encode("The moon") == PROMPT
    assert engine.decode(PROMPT) == "The moon"


def test_cut_characters_are_trimmed_from_a_continuations_text(engine: TransformersEngine) -> None:
    token_ids = tuple(engine.encode("é moon é"))
    cut = engine._generation(token_ids[:1], token_ids[1:-1], "length", 0)
    assert (cut.text, cut.flaw) == (" moon ", "")
    assert engine._generation((), tuple(engine.encode(" moon")), "length", 0).text == " moon"


def test_an_empty_continuation_has_no_score(engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="continuation 1 is empty"):
        run(engine.score(PROMPT, [[1], []]))


def test_a_late_answer_is_an_error_and_a_cancelled_one_is_skipped_and_a_closed_engine_refuses(tiny_model: Path) -> None:
    with started(tiny_model, timeout_s=0.3, max_batch_tokens=100_000) as engine:
        with pytest.raises(EngineError, match=r"engine.timeout_s = 0.3"):
            run(engine.generate([PROMPT], Sampling(max_tokens=240, num_samples=256)))
        ((generation,),) = run(engine.generate([PROMPT], Sampling(max_tokens=1)))
        assert len(generation.token_ids) == 1
    with pytest.raises(EngineError, match="closed"):
        run(engine.generate([PROMPT], Sampling(max_tokens=1)))


def test_a_request_that_is_cancelled_during_the_prefill_costs_the_others_of_its_batch_nothing(
    patient: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_tokens=8, seed=3)
    prefill = CausalModel.prefill

    async def work() -> tuple[list[list[Generation]], bool]:
        loop = asyncio.get_running_loop()
        gone = asyncio.ensure_future(patient.generate([OTHERS[0]], Sampling(max_tokens=200, num_samples=8)))

        def cancelling(model: CausalModel, prompts: Sequence[Tokens]) -> dict[Tokens, PrefilledPrompt]:
            loop.call_soon_threadsafe(gone.cancel)
            asyncio.run_coroutine_threadsafe(asyncio.wait([gone]), loop).result(10)
            return prefill(model, prompts)

        with monkeypatch.context() as patch:
            patch.setattr(CausalModel, "prefill", cancelling)
            answers = await patient.generate([PROMPT], sampling)
        return answers, gone.cancelled()

    answers, cancelled = run(work())
    assert cancelled
    assert answers == run(patient.generate([PROMPT], sampling))


def test_cancelled_requests_leave_room_in_a_full_queue(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        waiting = [asyncio.ensure_future(engine.generate([PROMPT], Sampling(max_tokens=4))) for _ in range(3)]
        await asyncio.sleep(0)
        for request in waiting:
            request.cancel()
        await asyncio.wait(waiting)
        await asyncio.gather(*(engine.generate([PROMPT], Sampling(max_tokens=4)) for _ in range(3)))

    with started(tiny_model, max_queued_requests=3, batch_wait_s=0.5) as engine:
        run(work(engine))


def test_adapters_are_refused(engine: TransformersEngine) -> None:
    for work in (
        engine.generate([PROMPT], Sampling(max_tokens=1, adapter="lora")),
        engine.score(PROMPT, [[1]], adapter="lora"),
    ):
        with pytest.raises(PromptError, match="takes no LoRA adapter such as 'lora'"):
            run(work)


def test_a_chat_begins_with_the_system_prompt_and_takes_the_templates_arguments(tiny_model: Path) -> None:
    settings = {"system_prompt": "Be brief.", "chat_template_arguments": {"enable_thinking": False}}
    with started(tiny_model, **settings) as engine:
        engine._chat.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ enable_thinking }}"
        )
        assert engine.render_chat("Hello") == "[system]Be brief.[user]HelloFalse"


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere"), started(tmp_path / "nowhere"):
        pass
