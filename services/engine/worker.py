"""The thread that owns a model: takes batches from the queue, answers them, swaps weights between two batches.

    event loop --put--> JobQueue --take--> Worker --future--> event loop

Whoever waits is on the event loop's side, by futures; this thread blocks on the queue only.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal

import torch
import transformers

from services.engine import decoding
from services.engine.base import Generation
from services.engine.jobs import Batch, GenerateJob, JobQueue, LoadJob, ScoreJob, fail
from services.engine.model import CausalModel, load_model
from services.engine.trunks import Tokens
from shared import metrics
from shared.errors import EngineError
from shared.settings import EngineSettings

_log = logging.getLogger(__name__)

_BATCH_ERRORS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


MakeGeneration = Callable[[Tokens, Tokens, Literal["length", "stop"], int], Generation]


class Worker:
    """`make_generation` gives a sample its text: from prompt, tokens, finish reason, and weight version."""

    def __init__(self, settings: EngineSettings, queue: JobQueue, make_generation: MakeGeneration) -> None:
        self._settings = settings
        self._queue = queue
        self._make_generation = make_generation
        self._loaded: Future[CausalModel] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.weight_version = 0

    def start(self) -> "Future[CausalModel]":
        """The model once it is loaded; its module must not be called from any other thread."""
        self._thread.start()
        return self._loaded

    def join(self, *, timeout_s: float) -> None:
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            model = self._load()
        except BaseException as exc:
            self._loaded.set_exception(exc)
            if not isinstance(exc, EngineError):
                raise
            return
        self._loaded.set_result(model)
        try:
            while (batch := self._queue.take()) is not None:
                self._answer(model, batch)
        finally:
            self._queue.close("the engine has stopped: restart the service")

    def _load(self) -> CausalModel:
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if self._settings.num_threads:
            torch.set_num_threads(self._settings.num_threads)
        started = time.perf_counter()
        model = load_model(self._settings)
        _log.info(
            "model loaded",
            extra={
                "model": self._settings.model,
                "device": str(model.device),
                "dtype": self._settings.dtype,
                "num_parameters": sum(parameter.numel() for parameter in model.module.parameters()),
                "seconds": round(time.perf_counter() - started, 2),
            },
        )
        return model

    def _answer(self, model: CausalModel, batch: Batch) -> None:
        jobs = [batch] if isinstance(batch, LoadJob) else batch
        try:
            if isinstance(batch, LoadJob):
                self._swap_weights(model, batch)
            elif isinstance(batch[0], GenerateJob):
                self._generate(model, [job for job in batch if isinstance(job, GenerateJob)])
            else:
                self._score(model, [job for job in batch if isinstance(job, ScoreJob)])
        except _BATCH_ERRORS as exc:
            # Out of memory, or a bug that one batch sets off: this batch fails, the next may not.
            _log.exception("a batch of %d requests failed", len(jobs))
            error = f"the model failed on a batch of {len(jobs)} requests: {type(exc).__name__}: {exc}"
            for job in jobs:
                fail(job, EngineError(error))
        except BaseException as exc:
            for job in jobs:
                fail(job, EngineError(f"the engine broke down: {type(exc).__name__}: {exc}"))
            raise

    def _generate(self, model: CausalModel, jobs: Sequence[GenerateJob]) -> None:
        rows = [_rows(job, model.max_positions) for job in jobs]
        decoding.generate(model, [row for of_job in rows for of_prompt in of_job for row in of_prompt])
        for job, of_job in zip(jobs, rows, strict=True):
            if job.future.set_running_or_notify_cancel():
                job.future.set_result([[self._generation(row) for row in of_prompt] for of_prompt in of_job])

    @torch.inference_mode()
    def _score(self, model: CausalModel, jobs: Sequence[ScoreJob]) -> None:
        pairs = [(job.prompt, continuation) for job in jobs for continuation in job.continuations]
        metrics.engine_batch_rows.set(len(pairs))
        scores = iter(model.score(pairs))
        for job in jobs:
            of_job = [next(scores) for _ in job.continuations]
            if job.future.set_running_or_notify_cancel():
                job.future.set_result((of_job, self.weight_version))

    def _swap_weights(self, model: CausalModel, job: LoadJob) -> None:
        if job.base not in (None, self.weight_version):
            fail(job, EngineError(f"changes since version {job.base} do not fit version {self.weight_version}"))
            return
        began = time.perf_counter()
        job.write(model.module)
        self.weight_version = job.version
        metrics.weight_load_seconds.labels("pause").observe(time.perf_counter() - began)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(None)

    def _generation(self, row: decoding.Row) -> Generation:
        assert row.finish_reason
        return self._make_generation(row.prompt, tuple(row.token_ids), row.finish_reason, self.weight_version)


def _rows(job: GenerateJob, max_positions: int) -> list[list[decoding.Row]]:
    """Per prompt its samples. The end of the context ends a row like `max_tokens` does."""
    sampling = job.sampling
    return [
        [
            decoding.Row(
                prompt=prompt,
                max_tokens=min(sampling.bound(index), max_positions - len(prompt)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed + index,
                sample=sample,
                is_abandoned=job.future.cancelled,
            )
            for sample in range(sampling.num_samples)
        ]
        for index, prompt in enumerate(job.prompts)
    ]
