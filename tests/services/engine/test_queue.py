"""Which jobs the queue puts into a batch, and in what order."""

from typing import Any

import pytest

from services.engine.base import Sampling
from services.engine.hf.queue import GenerateJob, Job, JobQueue, LoadJob, ScoreJob
from shared import metrics
from shared.errors import EngineError, OverloadedError


def generate_job(num_tokens: int, *, num_samples: int = 1) -> GenerateJob:
    return GenerateJob([(1,) * num_tokens], Sampling(max_tokens=10, num_samples=num_samples))


def make_queue(*jobs: Job[Any], max_queued: int = 10) -> JobQueue:
    queue = JobQueue(max_queued=max_queued, max_batch_tokens=100, batch_wait_s=0.0)
    for job in jobs:
        queue.put(job)
    return queue


def test_a_batch_takes_what_fits_and_keeps_the_order() -> None:
    first, big, small = generate_job(20), generate_job(40), generate_job(20)
    queue = make_queue(first, big, small)
    assert [queue.take(), queue.take()] == [[first, big], [small]]


def test_small_jobs_do_not_overtake_a_big_one_of_their_kind() -> None:
    first, big, small = generate_job(20), generate_job(40, num_samples=9), generate_job(1)
    queue = make_queue(first, big, small)
    assert [queue.take(), queue.take()] == [[first], [big]]


def test_batches_are_of_one_kind() -> None:
    generate, score, other = generate_job(5), ScoreJob((1,), [(2,)]), generate_job(6)
    queue = make_queue(generate, score, other)
    assert [queue.take(), queue.take()] == [[generate, other], [score]]


def test_weights_go_first_and_cancelled_jobs_are_never_taken() -> None:
    gone, job, load = generate_job(5), generate_job(5), LoadJob(lambda module: None, 1)
    gone.future.cancel()
    queue = make_queue(gone, job, load)
    assert [queue.take(), queue.take()] == [load, [job]]


def test_a_full_queue_refuses_and_a_closed_one_fails_what_waits() -> None:
    job = generate_job(5)
    queue = make_queue(job, max_queued=1)
    with pytest.raises(OverloadedError, match="max_queued_requests"):
        queue.put(generate_job(5))
    queue.close("the end")
    assert isinstance(job.future.exception(timeout=1), EngineError)
    assert queue.take() is None


def test_a_cancelled_job_frees_its_place_at_once() -> None:
    gone = generate_job(5)
    queue = make_queue(gone, max_queued=1)
    gone.future.cancel()
    assert metrics.REGISTRY.get_sample_value("headwater_engine_queued_requests") == 0
    job = generate_job(5)
    queue.put(job)
    assert queue.take() == [job]
