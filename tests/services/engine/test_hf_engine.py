"""The engine that runs a model in this process, on a tiny random Llama."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.engine.base import Generation, Sampling
from services.engine.hf.engine import TransformersEngine
from shared import metrics
from shared.errors import EngineError, OverloadedError, PromptError
from shared.settings import EngineSettings

PROMPT = [52, 258, 297, 263]
OTHERS = [[5, 6], [9] * 40, [17, 18, 19], [200, 4, 100, 80, 41]]


@asynccontextmanager
async def started(model: Path, **settings: object) -> AsyncIterator[TransformersEngine]:
    engine = TransformersEngine(EngineSettings.model_validate({"model": str(model), "device": "cpu"} | settings))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def with_engine(model: Path, work: Callable[[TransformersEngine], Awaitable[object]], **settings: object) -> object:
    """The result of `work` on a started engine, within a minute."""

    async def run() -> object:
        async with started(model, **settings) as engine:
            return await asyncio.wait_for(work(engine), 60)

    return asyncio.run(run())


def tokens(generations: list[Generation]) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in generations]


def prefilled() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_engine_prompt_tokens_total") or 0.0


def reference(model: Path) -> Any:
    """The plain model, without gradients."""
    module: Any = AutoModelForCausalLM.from_pretrained(model)
    return module.eval().requires_grad_(False)


def hf_log_probs(model: Path, prompt: list[int], continuation: list[int]) -> list[float]:
    """One unbatched forward pass without any cache."""
    module = reference(model)
    with torch.no_grad():
        logits = module(torch.tensor([prompt + continuation])).logits[0]
    return [float(torch.log_softmax(logits[len(prompt) - 1 + i], -1)[token]) for i, token in enumerate(continuation)]


def test_other_requests_in_the_batch_do_not_change_answers(tiny_model: Path) -> None:
    sampling = Sampling(max_tokens=24, num_samples=3, temperature=0.9, top_p=0.8, seed=7)

    async def work(engine: TransformersEngine) -> None:
        (alone,) = await engine.generate([PROMPT], sampling)
        others = [
            engine.generate([other], Sampling(max_tokens=5 + 9 * i, num_samples=1 + i, temperature=i / 2, seed=i))
            for i, other in enumerate(OTHERS)
        ]
        (together,), *_ = await asyncio.gather(engine.generate([PROMPT], sampling), *others)
        assert tokens(together) == tokens(alone)
        assert len(set(tokens(alone))) == 3

    with_engine(tiny_model, work, batch_wait_s=0.2)


def test_rows_split_over_several_batches_give_the_same_answers(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> list[list[tuple[int, ...]]]:
        answers = await engine.generate([PROMPT, *OTHERS], Sampling(max_tokens=16, num_samples=4, seed=3))
        return [tokens(of_prompt) for of_prompt in answers]

    assert with_engine(tiny_model, work) == with_engine(tiny_model, work, max_batch_tokens=64)


def test_seeds_decide_and_rows_count_on_from_them(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        def sampling(seed: int) -> Sampling:
            return Sampling(max_tokens=16, seed=seed)

        (first,), (second,) = await engine.generate([PROMPT, PROMPT], sampling(5))
        assert first.token_ids != second.token_ids
        assert tokens((await engine.generate([PROMPT], sampling(5)))[0]) == [first.token_ids]
        assert tokens((await engine.generate([PROMPT], sampling(6)))[0]) == [second.token_ids]

    with_engine(tiny_model, work)


def test_greedy_takes_the_likeliest_token_each_time(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> list[int]:
        ((generation,),) = await engine.generate([PROMPT], Sampling(max_tokens=6, temperature=0))
        return list(generation.token_ids)

    chosen = with_engine(tiny_model, work)
    assert isinstance(chosen, list)
    module = reference(tiny_model)
    for index, token in enumerate(chosen):
        logits = module(torch.tensor([PROMPT + chosen[:index]])).logits[0, -1]
        assert token == int(logits.argmax())


def test_sampled_shares_follow_the_models_probabilities(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> list[int]:
        (generations,) = await engine.generate([PROMPT], Sampling(max_tokens=1, num_samples=4000, seed=1))
        return [generation.token_ids[0] for generation in generations]

    drawn = with_engine(tiny_model, work)
    assert isinstance(drawn, list)
    module = reference(tiny_model)
    probs = torch.softmax(module(torch.tensor([PROMPT])).logits[0, -1], -1)
    for token in probs.topk(5).indices.tolist():
        expected = float(probs[token])
        assert drawn.count(token) / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))


def test_samples_and_chunks_of_a_document_share_one_prefill(tiny_model: Path) -> None:
    document = list(range(20, 80))

    async def work(engine: TransformersEngine) -> None:
        before = prefilled()
        prompts = [document[:start] for start in (16, 32, 60)]
        await engine.generate(prompts, Sampling(max_tokens=4, num_samples=8))
        assert prefilled() - before == 60

    with_engine(tiny_model, work)


def test_chunks_continue_as_if_each_had_been_prefilled_alone(tiny_model: Path) -> None:
    document = list(range(20, 80))

    async def work(engine: TransformersEngine) -> None:
        sampling = Sampling(max_tokens=8, temperature=0)
        together = await engine.generate([document[:start] for start in (16, 32, 60)], sampling)
        for start, generations in zip((16, 32, 60), together, strict=True):
            assert tokens((await engine.generate([document[:start]], sampling))[0]) == tokens(generations)

    with_engine(tiny_model, work)


def test_end_of_sequence_stops_a_row_and_is_its_last_token(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> list[Generation]:
        (generations,) = await engine.generate([PROMPT], Sampling(max_tokens=200, num_samples=64, temperature=2.0))
        return generations

    generations = with_engine(tiny_model, work)
    assert isinstance(generations, list)
    stopped = [generation for generation in generations if generation.finish_reason == "stop"]
    assert stopped
    assert len(stopped) < len(generations)
    assert all(0 not in generation.token_ids[:-1] for generation in generations)
    assert all(generation.token_ids[-1] == 0 for generation in stopped)
    assert all("<|end|>" not in generation.text for generation in stopped)
    assert all(len(generation.token_ids) == 200 for generation in generations if generation not in stopped)


def test_scores_equal_a_plain_forward_pass(tiny_model: Path) -> None:
    continuations = [[40], [41, 42, 43], [7] * 20]

    async def work(engine: TransformersEngine) -> list[list[float]]:
        return await engine.score(PROMPT, continuations)

    scores = with_engine(tiny_model, work)
    assert isinstance(scores, list)
    for given, continuation in zip(scores, continuations, strict=True):
        assert given == pytest.approx(hf_log_probs(tiny_model, PROMPT, continuation), abs=1e-4)


def test_concurrent_scores_share_batches_and_stay_right(tiny_model: Path) -> None:
    document = list(range(30, 90))
    requests = [(document[:n], [[n], [n, n + 1]]) for n in (5, 20, 60)] + [(other, [[3]]) for other in OTHERS]

    async def work(engine: TransformersEngine) -> list[list[list[float]]]:
        return await asyncio.gather(*(engine.score(prompt, given) for prompt, given in requests))

    answers = with_engine(tiny_model, work, batch_wait_s=0.2)
    assert isinstance(answers, list)
    for (prompt, continuations), scores in zip(requests, answers, strict=True):
        for continuation, given in zip(continuations, scores, strict=True):
            assert given == pytest.approx(hf_log_probs(tiny_model, prompt, continuation), abs=1e-4)


def test_questions_that_begin_alike_run_what_they_share_once(tiny_model: Path) -> None:
    document, candidates = list(range(20, 90)), [[n] * 40 + [n + 1, 3] for n in (100, 120, 140, 160)]
    prompts = [document + a + b for a in candidates for b in candidates if a != b] + [document[:30]]

    async def work(engine: TransformersEngine) -> list[list[list[float]]]:
        before = prefilled()
        answers = await asyncio.gather(*(engine.score(prompt, [[5], [6, 7]]) for prompt in prompts))
        # the document, four candidates after it, and twelve after those; then one more token of [6, 7] each
        assert prefilled() - before == 70 + 4 * 42 + 12 * 42 + len(prompts)
        return answers

    answers = with_engine(tiny_model, work, batch_wait_s=0.2)
    assert isinstance(answers, list)
    for prompt, scores in zip(prompts, answers, strict=True):
        for continuation, given in zip([[5], [6, 7]], scores, strict=True):
            assert given == pytest.approx(hf_log_probs(tiny_model, prompt, continuation), abs=1e-4)


def test_token_scores_name_the_best_token(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        ((generation,),) = await engine.generate([PROMPT], Sampling(max_tokens=3, temperature=0))
        ((*scores,),), version = await engine.score_tokens(PROMPT, [generation.token_ids])
        assert [score.best_token_id for score in scores] == list(generation.token_ids)
        assert [score.best_log_prob for score in scores] == [score.log_prob for score in scores]
        assert version == 0

    with_engine(tiny_model, work)


def test_text_prompts_are_encoded_without_special_tokens(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        assert engine.encode("The moon") == PROMPT
        assert engine.decode(PROMPT) == "The moon"
        by_text = await engine.generate(["The moon"], Sampling(max_tokens=8))
        assert by_text == await engine.generate([PROMPT], Sampling(max_tokens=8))

    with_engine(tiny_model, work)


def test_cut_characters_are_trimmed_from_a_continuations_text(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        token_ids = tuple(engine.encode("é moon é"))
        cut = engine._generation(token_ids[:1], token_ids[1:-1], "length", 0)
        assert (cut.text, cut.flaw) == (" moon ", "")
        assert engine._generation((), tuple(engine.encode(" moon")), "length", 0).text == " moon"

    with_engine(tiny_model, work)


def test_each_prompt_has_its_own_bound(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        long = await engine.generate([PROMPT, OTHERS[1]], Sampling(max_tokens=9, num_samples=2, seed=3))
        short = await engine.generate([PROMPT, OTHERS[1]], Sampling.bounded([9, 2], num_samples=2, seed=3))
        assert tokens(short[0]) == tokens(long[0])
        assert tokens(short[1]) == [token_ids[:2] for token_ids in tokens(long[1])]

    with_engine(tiny_model, work)


@pytest.mark.parametrize(("prompt", "words"), [([1] * 256, "256 tokens"), ([], "empty"), ([300], "0..299")])
def test_hopeless_prompts_are_refused_for_good(tiny_model: Path, prompt: list[int], words: str) -> None:
    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(PromptError, match=words) as caught:
            await engine.generate([prompt], Sampling(max_tokens=4))
        assert not caught.value.retryable

    with_engine(tiny_model, work)


def test_an_empty_continuation_has_no_score(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        with pytest.raises(EngineError, match="continuation 1 is empty"):
            await engine.score(PROMPT, [[1], []])

    with_engine(tiny_model, work)


def test_the_end_of_the_context_ends_a_row(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        ((generation,),) = await engine.generate([[9] * 250], Sampling(max_tokens=50, seed=4))
        assert (len(generation.token_ids), generation.finish_reason) == (6, "length")

    with_engine(tiny_model, work)


def test_a_full_queue_is_overloaded(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        sampling = Sampling(max_tokens=64, num_samples=16)
        requests = [engine.generate([PROMPT], sampling) for _ in range(12)]
        answers = await asyncio.gather(*requests, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
        assert refused
        assert len(answers) - len(refused) >= 2
        assert all(isinstance(answer, (list, OverloadedError)) for answer in answers)

    with_engine(tiny_model, work, max_queued_requests=2, batch_wait_s=0.05)


def test_a_late_answer_is_an_error_and_a_cancelled_one_is_skipped(tiny_model: Path) -> None:
    async def work(engine: TransformersEngine) -> None:
        long = engine.generate([PROMPT], Sampling(max_tokens=240, num_samples=256))
        with pytest.raises(EngineError, match=r"engine.timeout_s = 0.3"):
            await long
        ((generation,),) = await engine.generate([PROMPT], Sampling(max_tokens=1))
        assert len(generation.token_ids) == 1

    with_engine(tiny_model, work, timeout_s=0.3, max_batch_tokens=100_000)


def test_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    async def work() -> None:
        engine = TransformersEngine(EngineSettings(model=str(tmp_path / "nowhere")))
        with pytest.raises(EngineError, match="nowhere"):
            await engine.start()
        await engine.close()

    asyncio.run(work())


def test_a_closed_engine_refuses(tiny_model: Path) -> None:
    async def work() -> None:
        async with started(tiny_model) as engine:
            pass
        with pytest.raises(EngineError, match="closed"):
            await engine.generate([PROMPT], Sampling(max_tokens=1))

    asyncio.run(work())
