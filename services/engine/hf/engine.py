"""The engine for CPUs and single GPUs: a causal language model of transformers, in this process.

    event loop --put--> JobQueue --take--> worker thread --future--> event loop

Requests that arrive together form a batch (queue.py). Samples of a prompt and chunks of a document share a prefill
(prefill.py). Rows of any length and temperature decode together, each with its own randomness (decode.py).
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from services.engine.base import Generation, Prompt, Sampling, TokenScore
from services.engine.hf.decode import Row, generate
from services.engine.hf.model import CausalModel, load_model
from services.engine.hf.queue import Batch, GenerateJob, Job, JobQueue, LoadJob, ScoreJob
from services.engine.local import LocalEngine
from services.engine.weights import apply_patches, apply_weights, in_memory, read_patches, read_weights
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, PromptError
from shared.weights.checkpoint_names import keeps_other_names

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CLOSE_S = 5.0
_BATCH_ERRORS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

_MakeGeneration = Callable[[Row, int, tuple[str, ...]], Generation]
"""From a finished row, the weight version, and the words of its sampling."""


class TransformersEngine(LocalEngine):
    """See `Engine`. Also a `TokenScorer` and a `PatchableEngine`."""

    can_constrain = False
    can_patch = True

    def __init__(self, settings: EngineSettings, *, tokenizer: str = "") -> None:
        """`tokenizer`: folder or name, if not the model's."""
        super().__init__(settings, name=f"transformers:{settings.model}", tokenizer=tokenizer)
        bounds = {"max_queued": settings.max_queued_requests, "max_batch_tokens": settings.max_batch_tokens}
        self._queue = JobQueue(**bounds, batch_wait_s=settings.batch_wait_s)
        self._worker = _Worker(settings, self._queue, self._shown)

    @property
    def weight_version(self) -> int:
        return self._worker.weight_version

    async def start(self) -> None:
        await self._load_tokenizer()
        self._model = model = await asyncio.wrap_future(self._worker.start())
        self.can_patch = not await asyncio.to_thread(keeps_other_names, model.module)  # patches have the checkpoint's

    async def close(self) -> None:
        self._queue.close("the engine is closed")
        await asyncio.to_thread(self._worker.join, timeout_s=_CLOSE_S)

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        if not prompts:
            return []
        if sampling.pattern:
            raise PromptError(f"{self.name} can't constrain its answers to a pattern: use engine.kind = 'vllm'")
        self._refuse_adapter(sampling.adapter)
        encoded = [self._prepare(prompt, room=1) for prompt in prompts]
        return await self._answer(GenerateJob(encoded, sampling, self._watched(sampling.words)))

    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = ""
    ) -> tuple[list[list[TokenScore]], int]:
        self._refuse_adapter(adapter)
        if not continuations:
            return [], self.weight_version
        encoded = self._encode_scored(continuations)
        # The last token is predicted but never fed to the model.
        return await self._answer(ScoreJob(self._prepare(prompt, room=max(map(len, encoded)) - 1), encoded))

    async def load_weights(self, folder: Path, version: int) -> None:
        tensors = await asyncio.to_thread(_read_for, self._started.module, folder)
        await self._answer(LoadJob(lambda module: apply_weights(module, tensors), version))

    async def patch_weights(self, patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
        found = await asyncio.to_thread(read_patches, patches, module=self._started.module)
        await self._answer(LoadJob(lambda module: apply_patches(module, found), version, base))

    def _shown(self, row: Row, version: int, words: tuple[str, ...]) -> Generation:
        assert row.finish_reason
        token_ids = tuple(row.token_ids)
        return self._generation(
            row.prompt, token_ids, row.finish_reason, version, words=words, log_probs=row.watched_log_probs
        )

    def _refuse_adapter(self, adapter: str) -> None:
        if adapter:
            raise PromptError(f"{self.name} takes no LoRA adapter such as {adapter!r}: use engine.kind = 'vllm'")

    async def _answer(self, job: "Job[T]") -> T:
        """Within `timeout_s`; after that the job is cancelled and the worker skips it."""
        self._queue.put(job)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.future), self._settings.timeout_s)
        except TimeoutError as exc:
            late = f"{self.name} gave no answer within engine.timeout_s = {self._settings.timeout_s}"
            raise EngineError(late) from exc


def _read_for(module: Any, folder: Path) -> dict[str, Tensor]:
    return in_memory(module, read_weights(module, folder))


class _Worker:
    """The thread that owns the model: answers batches from the queue and swaps weights between two of them."""

    def __init__(self, settings: EngineSettings, queue: JobQueue, make_generation: _MakeGeneration) -> None:
        self._settings = settings
        self._queue = queue
        self._make_generation = make_generation
        self._loaded: Future[CausalModel] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.weight_version = 0

    def start(self) -> "Future[CausalModel]":
        """The model, once loaded; no other thread may call its module."""
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
        seconds = round(time.perf_counter() - started, 2)
        num_parameters = sum(parameter.numel() for parameter in model.module.parameters())
        shown = {"model": self._settings.model, "device": str(model.device), "dtype": self._settings.dtype}
        _log.info("model loaded", extra=shown | {"num_parameters": num_parameters, "seconds": seconds})
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
            # Out of memory, or a bug that this batch triggers: the next batch may work.
            _log.exception("a batch of %d requests failed", len(jobs))
            error = f"the model failed on a batch of {len(jobs)} requests: {type(exc).__name__}: {exc}"
            for job in jobs:
                job.fail(EngineError(error))
        except BaseException as exc:
            for job in jobs:
                job.fail(EngineError(f"the engine broke down: {type(exc).__name__}: {exc}"))
            raise

    def _generate(self, model: CausalModel, jobs: Sequence[GenerateJob]) -> None:
        rows = [_rows(job, model.max_tokens) for job in jobs]
        generate(model, [row for of_job in rows for of_prompt in of_job for row in of_prompt])
        for job, of_job in zip(jobs, rows, strict=True):
            if not job.future.cancelled():  # its rows may not have begun
                job.finish([[self._generation(row, job) for row in of_prompt] for of_prompt in of_job])

    def _generation(self, row: Row, job: GenerateJob) -> Generation:
        return self._make_generation(row, self.weight_version, job.sampling.words)

    @torch.inference_mode()
    def _score(self, model: CausalModel, jobs: Sequence[ScoreJob]) -> None:
        pairs = [(job.prompt, continuation) for job in jobs for continuation in job.continuations]
        metrics.engine_batch_rows.set(len(pairs))
        scores = iter(model.score(pairs))
        for job in jobs:
            of_job = [next(scores) for _ in job.continuations]
            job.finish((of_job, self.weight_version))

    def _swap_weights(self, model: CausalModel, job: LoadJob) -> None:
        if job.base not in (None, self.weight_version):
            job.fail(EngineError(f"changes since version {job.base} do not fit version {self.weight_version}"))
            return
        began = time.perf_counter()
        job.write(model.module)
        self.weight_version = job.version
        metrics.weight_load_seconds.labels("pause").observe(time.perf_counter() - began)
        job.finish(None)


def _rows(job: GenerateJob, model_tokens: int) -> list[list[Row]]:
    """The samples of each prompt. The end of the context ends a row like `max_tokens` does."""
    sampling = job.sampling
    return [
        [
            Row(
                prompt=prompt,
                max_tokens=min(sampling.bound(index), model_tokens - len(prompt)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed + index,
                sample=sample,
                is_abandoned=job.future.cancelled,
                watched=job.watched,
            )
            for sample in range(sampling.num_samples)
        ]
        for index, prompt in enumerate(job.prompts)
    ]
