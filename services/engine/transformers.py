"""The engine for CPUs and single GPUs: any causal model of Hugging Face transformers, in this process.

Requests that arrive together are batched (jobs.py), samples and the chunks of one document share a prefill
(trunks.py), rows of all lengths and temperatures decode together (decoding.py), each with its own randomness
(sampling.py). One thread owns the model (worker.py). Built by build.py.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from services.engine.base import Generation, Prompt, Sampling, TokenScore
from services.engine.jobs import GenerateJob, JobQueue, LoadJob, ScoreJob
from services.engine.local import LocalEngine
from services.engine.model import CausalModel
from services.engine.weights import (
    Patch,
    apply_patches,
    apply_weights,
    check_patches,
    read_patches,
    read_weights,
)
from services.engine.worker import Worker
from shared.errors import EngineError, PromptError
from shared.settings import EngineSettings

T = TypeVar("T")

_CLOSE_S = 5.0


class TransformersEngine(LocalEngine):
    """See `Engine`. Also a `TokenScorer` and a `PatchableEngine`."""

    def __init__(self, settings: EngineSettings, *, tokenizer: str = "") -> None:
        """`tokenizer`: folder or name, where it is not the model's."""
        super().__init__(tokenizer=tokenizer or settings.model)
        self._settings = settings
        self._queue = JobQueue(
            max_queued=settings.max_queued_requests,
            max_batch_tokens=settings.max_batch_tokens,
            batch_wait_s=settings.batch_wait_s,
        )
        self._worker = Worker(settings, self._queue, self._generation)
        self._model: CausalModel | None = None

    @property
    def name(self) -> str:
        return f"transformers:{self._settings.model}"

    @property
    def weight_version(self) -> int:
        return self._worker.weight_version

    @property
    def can_constrain(self) -> bool:
        return False

    async def start(self) -> None:
        await self._load_tokenizer()
        self._model = await asyncio.wrap_future(self._worker.start())

    async def close(self) -> None:
        self._queue.close("the engine is closed")
        await asyncio.to_thread(self._worker.join, timeout_s=_CLOSE_S)

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        if not prompts:
            return []
        if sampling.pattern:
            raise PromptError(f"{self.name} can't hold its answers to a pattern: use engine.kind = 'vllm'")
        job = GenerateJob([self._prepare(prompt, room=1) for prompt in prompts], sampling)
        self._queue.put(job)
        return await self._answer(job.future)

    async def score_tokens(self, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[list[TokenScore]], int]:
        if not continuations:
            return [], self.weight_version
        encoded = self._encode_scored(continuations)
        # The last token is only predicted, it needs no place of its own.
        job = ScoreJob(self._prepare(prompt, room=max(map(len, encoded)) - 1), encoded)
        self._queue.put(job)
        return await self._answer(job.future)

    async def load_weights(self, folder: Path, version: int) -> None:
        tensors = await asyncio.to_thread(read_weights, self._started.module, folder)
        await self._swap(LoadJob(lambda module: apply_weights(module, tensors), version))

    @property
    def can_patch(self) -> bool:
        return True

    async def patch_weights(self, patches: Path, *, base: int, version: int) -> None:
        found = await asyncio.to_thread(self._read_patches, patches)
        await self._swap(LoadJob(lambda module: apply_patches(module, found), version, base))

    def _read_patches(self, file: Path) -> list[Patch]:
        patches = read_patches(file)
        check_patches(self._started.module, patches)
        return patches

    async def _swap(self, job: LoadJob) -> None:
        self._queue.put(job)
        await self._answer(job.future)

    @property
    def _started(self) -> CausalModel:
        if self._model is None:
            raise self._starting()
        return self._model

    @property
    def _vocab_size(self) -> int:
        return self._started.vocab_size

    @property
    def _eos_token_ids(self) -> frozenset[int]:
        return self._started.eos_token_ids

    @property
    def _max_tokens(self) -> int:
        return self._started.max_positions

    async def _answer(self, future: "Future[T]") -> T:
        """Bounded; giving up cancels the job, which the worker then skips."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._settings.timeout_s)
        except TimeoutError as exc:
            raise EngineError(
                f"{self.name} gave no answer within engine.timeout_s = {self._settings.timeout_s}"
            ) from exc
