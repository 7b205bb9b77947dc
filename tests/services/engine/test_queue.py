"""Which jobs the queue puts into a batch, and in what order."""

import pytest

from services.engine.base import Sampling
from services.engine.hf.queue import GenerateJob, JobQueue, LoadJob, ScoreJob
from shared.errors import EngineError, OverloadedError


def generate_job(num_tokens: int, *, num_samples: int = 1) -> GenerateJob:
    return GenerateJob([(1,) * num_tokens], Sampling(max_tokens=10, num_samples=num_samples))


def make_queue(*, max_queued: int = 10, max_batch_tokens: int = 100) -> JobQueue:
    return JobQueue(max_queued=max_queued, max_batch_tokens=max_batch_tokens, batch_wait_s=0.0)


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
