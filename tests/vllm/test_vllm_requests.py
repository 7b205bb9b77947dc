"""What vLLM does for a request beyond the contract, on its real engine core."""

import asyncio

import pytest

from services.engine.base import Sampling
from shared import metrics
from shared.errors import EngineError
from tests.services.serving import wait_until
from tests.vllm import reference
from tests.vllm.subjects import Subject, running_rows, until_running

BLOCK = 32
"""Tokens of a block in the prefix cache: what is shared is shared in whole blocks."""


def prefilled() -> float:
    return metrics.REGISTRY.get_sample_value("headwater_engine_prompt_tokens_total") or 0.0


def test_greedy_answers_agree_with_transformers_token_by_token(
    vllm_engine: Subject, transformers_engine: Subject
) -> None:
    document = [(7 * i) % 290 + 5 for i in range(200)]
    prompts = [document[:end] for end in range(1, 200, 9)] + [document[start : start + 11] for start in range(20)]
    sampling = Sampling(max_tokens=32, temperature=0)
    ours = vllm_engine.do(vllm_engine.engine.generate(prompts, sampling))
    theirs = transformers_engine.do(transformers_engine.engine.generate(prompts, sampling))
    assert ours == theirs


def test_samples_share_one_prefill_of_their_prompt(vllm_engine: Subject) -> None:
    before = prefilled()
    prompt = list(range(40, 40 + 4 * BLOCK + 1))
    vllm_engine.do(vllm_engine.engine.generate([prompt], Sampling(max_tokens=2, num_samples=8)))
    assert prefilled() - before == len(prompt) + 7  # all but the first compute the one token behind whole blocks


def test_chunks_of_a_document_share_its_prefill(vllm_engine: Subject) -> None:
    before = prefilled()
    document = list(range(50, 50 + 6 * BLOCK + 1))
    chunks = [document[: n * BLOCK + 1] for n in range(1, 7)]
    vllm_engine.do(vllm_engine.engine.generate(chunks, Sampling(max_tokens=2, num_samples=4)))
    assert prefilled() - before == len(document) + 6 * 4 - 1


def test_the_prefix_caches_own_counters_are_metrics(vllm_engine: Subject) -> None:
    def counted() -> list[float]:
        names = (f"headwater_engine_prefix_cache_{name}_total" for name in ("queries", "hits"))
        return [metrics.REGISTRY.get_sample_value(name) or 0.0 for name in names]

    prompt = list(range(70, 70 + 3 * BLOCK + 5))
    before = counted()
    for _ in range(2):
        vllm_engine.do(vllm_engine.engine.generate([prompt], Sampling(max_tokens=2)))
    # the first finds nothing, the second all whole blocks
    assert [after - known for after, known in zip(counted(), before, strict=True)] == [2 * len(prompt), 3 * BLOCK]


def test_seeded_requests_may_need_more_than_one_batch_to_prefill(vllm_engine: Subject) -> None:
    prompts = [[(start + 13 * i) % 290 + 5 for i in range(230)] for start in range(30)]
    sampling = Sampling(max_tokens=4, num_samples=2, seed=11)
    together = vllm_engine.do(vllm_engine.engine.generate(prompts, sampling))
    alone = vllm_engine.do(vllm_engine.engine.generate(prompts[:1], sampling))
    assert [len(of_prompt) for of_prompt in together] == [2] * 30
    assert together[:1] == alone


def test_many_labels_are_scored_after_one_prefill(vllm_engine: Subject) -> None:
    prompt, labels = list(range(60, 60 + 2 * BLOCK + 1)), [[token] for token in range(100)]
    before = prefilled()
    scores = vllm_engine.do(vllm_engine.engine.score(prompt, labels))
    assert prefilled() - before == len(prompt)
    for label, (score,) in zip(labels[::20], scores[::20], strict=True):
        assert score == pytest.approx(reference.log_probs(vllm_engine.model, prompt, label)[0], abs=1e-3)


def test_a_cancelled_request_is_taken_out_of_the_batch(vllm_engine: Subject) -> None:
    async def work() -> float:
        sampling = Sampling(max_tokens=240, num_samples=32, seed=9)
        request = asyncio.ensure_future(vllm_engine.engine.generate([[5, 6]] * 4, sampling))
        await until_running(64)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await vllm_engine.engine.generate([[5]], Sampling(max_tokens=2))
        return running_rows()

    assert vllm_engine.do(work()) <= 1


def test_a_late_answer_is_an_error_and_leaves_the_batch(vllm_engine: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried = vllm_engine.engine._settings.model_copy(update={"timeout_s": 0.3})  # type: ignore[attr-defined]
    monkeypatch.setattr(vllm_engine.engine, "_settings", hurried)
    with pytest.raises(EngineError, match=r"engine.timeout_s = 0.3"):
        vllm_engine.do(vllm_engine.engine.generate([[5, 6]] * 4, Sampling(max_tokens=240, num_samples=64)))
    monkeypatch.undo()
    ((generation,),) = vllm_engine.do(vllm_engine.engine.generate([[5]], Sampling(max_tokens=1)))
    assert len(generation.token_ids) == 1
    wait_until(lambda: running_rows() <= 1, what="the batch to be empty")
