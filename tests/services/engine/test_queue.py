"""The pure parts of the in-process engine: queue, trunks, packing, sampling."""

import pytest
import torch

from services.engine.base import Sampling
from services.engine.hf.decode import RowSampling, draw_uniforms
from services.engine.hf.prefill import Branch, pack, plan_branches
from services.engine.hf.queue import GenerateJob, JobQueue, LoadJob, ScoreJob
from shared.errors import EngineError, OverloadedError


def generate_job(num_tokens: int, *, num_samples: int = 1) -> GenerateJob:
    return GenerateJob([(1,) * num_tokens], Sampling(max_tokens=10, num_samples=num_samples))


def make_queue(*, max_queued: int = 10, max_batch_tokens: int = 100) -> JobQueue:
    return JobQueue(max_queued=max_queued, max_batch_tokens=max_batch_tokens, batch_wait_s=0.0)


def test_prompts_that_begin_another_share_its_branch() -> None:
    assert plan_branches([(1, 2), (7,), (1, 2, 3), (1,), (1, 2)]) == [
        [Branch((1, 2, 3), ((1, 2, 3), (1, 2), (1,))), Branch((7,), ((7,),))]
    ]
    assert plan_branches([]) == []


def test_a_short_shared_beginning_hangs_on_one_of_two_branches() -> None:
    (level,) = plan_branches([(1,), (1, 2), (1, 3)])
    assert sorted(branch.token_ids for branch in level) == [(1, 2), (1, 3)]
    assert sorted(prompt for branch in level for prompt in branch.prompts) == [(1,), (1, 2), (1, 3)]


def test_a_long_shared_beginning_is_run_once_and_gone_on_from() -> None:
    document, a, b = (1,) * 64, (2,) * 64, (3,) * 64
    prompts = [(*document, *first, last) for first in (a, b) for last in (4, 5)]
    beginning = document[:10]
    roots, stems, ends = plan_branches([*prompts, beginning])
    assert roots == [Branch(document, (beginning,))]
    assert stems == [Branch((*document, *first), (), document) for first in (a, b)]
    assert sorted(branch.token_ids for branch in ends) == sorted(prompts)
    assert all(branch.stem == branch.token_ids[:-1] and branch.prompts == (branch.token_ids,) for branch in ends)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "max_rows", "runs"),
    [
        ([5, 5, 2], 10, None, [range(0, 2), range(2, 3)]),
        ([50, 2, 2], 10, None, [range(0, 1), range(1, 3)]),
        ([2, 2, 2], 10, 2, [range(0, 2), range(2, 3)]),
        ([], 10, None, []),
    ],
)
def test_rows_are_packed_within_the_bounds(
    lengths: list[int], max_tokens: int, max_rows: int | None, runs: list[range]
) -> None:
    assert pack(lengths, max_tokens=max_tokens, max_rows=max_rows) == runs


def test_a_batch_takes_what_fits_and_keeps_the_order() -> None:
    queue = make_queue()
    first, big, small = generate_job(20), generate_job(40), generate_job(20)
    for job in (first, big, small):
        queue.put(job)
    assert queue.take() == [first, big]
    assert queue.take() == [small]


def test_small_jobs_do_not_overtake_a_big_one_of_their_kind() -> None:
    queue = make_queue()
    first, big, small = generate_job(20), generate_job(40, num_samples=9), generate_job(1)
    for job in (first, big, small):
        queue.put(job)
    assert queue.take() == [first]
    assert queue.take() == [big]


def test_batches_are_of_one_kind() -> None:
    queue = make_queue()
    generate, score, other = generate_job(5), ScoreJob((1,), [(2,)]), generate_job(6)
    for job in (generate, score, other):
        queue.put(job)
    assert queue.take() == [generate, other]
    assert queue.take() == [score]


def test_weights_go_before_waiting_requests() -> None:
    queue = make_queue()
    job, load = generate_job(5), LoadJob(lambda module: None, 1)
    queue.put(job)
    queue.put(load)
    assert queue.take() is load
    assert queue.take() == [job]


def test_cancelled_jobs_are_never_taken() -> None:
    queue = make_queue()
    gone, job = generate_job(5), generate_job(5)
    gone.future.cancel()
    queue.put(gone)
    queue.put(job)
    assert queue.take() == [job]


def test_a_full_queue_refuses_and_a_closed_one_fails_what_waits() -> None:
    queue = make_queue(max_queued=1)
    job = generate_job(5)
    queue.put(job)
    with pytest.raises(OverloadedError, match="max_queued_requests"):
        queue.put(generate_job(5))
    queue.close("the end")
    assert isinstance(job.future.exception(timeout=1), EngineError)
    assert queue.take() is None


def row_sampling(*rows: tuple[float, float, float]) -> RowSampling:
    """From (temperature, top_p, uniform) of each row."""
    return RowSampling(
        temperature=torch.tensor([row[0] for row in rows]),
        top_p=torch.tensor([row[1] for row in rows]),
        uniforms=torch.tensor([[row[2]] for row in rows]),
        any_random=any(row[0] > 0 for row in rows),
        any_nucleus=any(row[1] < 1 for row in rows),
    )


LOGITS = torch.tensor([0.2, 0.5, 0.3]).log()


@pytest.mark.parametrize(
    ("temperature", "top_p", "uniform", "token"),
    [
        (1.0, 1.0, 0.19, 0),
        (1.0, 1.0, 0.21, 1),
        (1.0, 1.0, 0.69, 1),
        (1.0, 1.0, 0.71, 2),
        (0.0, 1.0, 0.99, 1),
        # Of 0.5 and 0.3 the first takes 0.625 of the mass; the 0.2 is cut off.
        (1.0, 0.6, 0.0, 1),
        (1.0, 0.6, 0.62, 1),
        (1.0, 0.6, 0.63, 2),
        (1.0, 0.4, 0.99, 1),
        # Probabilities squared: 0.04, 0.25, 0.09 of 0.38.
        (0.5, 1.0, 0.10, 0),
        (0.5, 1.0, 0.11, 1),
        (0.5, 1.0, 0.77, 2),
    ],
)
def test_a_token_is_where_the_number_falls(temperature: float, top_p: float, uniform: float, token: int) -> None:
    sampling = row_sampling((temperature, top_p, uniform), (1.0, 1.0, 0.5), (0.7, 0.5, 0.5))
    assert sampling.pick(LOGITS.expand(3, 3), step=0)[0] == token


def test_randomness_depends_on_seed_and_sample_and_grows_at_its_end() -> None:
    assert list(draw_uniforms(1, 0, 4)) == list(draw_uniforms(1, 0, 9)[:4])
    assert draw_uniforms(1, 0, 1) != draw_uniforms(2, 0, 1)
    assert draw_uniforms(1, 0, 1) != draw_uniforms(1, 1, 1)
    numbers = draw_uniforms(3, 0, 10_000)
    assert numbers.mean() == pytest.approx(0.5, abs=0.02)
    assert numbers.min() >= 0
    assert numbers.max() < 1
