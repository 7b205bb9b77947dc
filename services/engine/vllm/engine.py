"""The production engine: vLLM in this process. vLLM's own HTTP routes, which ask for no token, stay closed.

    generate, score --vllm_core.py--> AsyncLLM --> engine core (a process of its own: scheduler and model)
    load_weights: check -> keep on disk -> pause, requests kept -> apply (vllm_weights.py) -> resume

The prefix cache must never serve keys of old weights: the pause clears it, and every request carries the number of the
load that it was asked under as salt. Requests in flight go on after an update, their keys computed anew. An update that
fails half way never answers: the last good weights are loaded again first. Built by build.py.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any

from services.concurrency import all_of
from services.engine.base import Generation, Prompt, Sampling, TokenScore
from services.engine.kept_weights import Kept, KeptWeights
from services.engine.local import LocalEngine
from services.engine.vllm.engine import ModelOutline, local_folder, read_outline
from services.engine.hf.prefill import Tokens
from services.engine.vllm.core import (
    MAX_SCORED_TOKENS,
    VllmCore,
    held_to,
    installed_version,
    next_token_scores,
    oldest_version,
    prompt_token_scores,
)
from services.engine.weights import check_patches, read_patches, read_weights
from shared import metrics
from shared.errors import EngineError, OverloadedError, PromptError
from shared.settings import EngineSettings

_log = logging.getLogger(__name__)


class VllmEngine(LocalEngine):
    """See `Engine`. Also a `TokenScorer`, a `PatchableEngine` and a `FallibleEngine`."""

    def __init__(self, settings: EngineSettings, *, tokenizer: str = "", constrains: bool = False) -> None:
        """`tokenizer`: folder or name, where it is not the model's; `constrains`: samples can be held to patterns.

        Raises SettingsError for a wrong vLLM.
        """
        super().__init__(tokenizer=tokenizer or settings.model)
        self._installed = installed_version()
        self._settings = settings
        self._constrains = constrains
        self._core = VllmCore(settings, tokenizer=self._tokenizer_source if constrains else "")
        self._outline: ModelOutline | None = None
        self._kept: KeptWeights | None = None
        self._requests: set[asyncio.Timeout] = set()
        self._version = 0
        self._num_loads = 0
        self._updating = asyncio.Lock()
        self._updates: set[asyncio.Task[None]] = set()
        self._failure = ""

    @property
    def name(self) -> str:
        adapter = f"+{self._settings.lora_adapter}" if self._settings.lora_adapter else ""
        return f"vllm:{self._settings.model}{adapter}"

    @property
    def weight_version(self) -> int:
        return self._version

    @property
    def can_constrain(self) -> bool:
        return self._constrains

    @property
    def can_patch(self) -> bool:
        """Not on a CPU, nor once a patch has failed: the model's loader may not be made for it."""
        return self._core.can_patch

    @property
    def failure(self) -> str:
        if not self._failure and self._core.is_dead:
            self._failure = f"{self.name} has died: the log holds its engine core's last words"
        return self._failure

    async def start(self) -> None:
        source = self._settings.model
        await self._load_tokenizer()
        outline = await asyncio.to_thread(read_outline, source)
        await self._core.start()
        self._kept = KeptWeights(await asyncio.to_thread(local_folder, source))
        self._outline = outline
        _log.info("model loaded", extra={"model": source, "vllm": self._installed, "max_tokens": self._core.max_tokens})

    async def close(self) -> None:
        self._fail(f"{self.name} is closed")
        await self._core.close()
        if self._kept is not None:
            self._kept.close()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        if not prompts:
            return []
        if sampling.pattern and not self._constrains:
            raise PromptError(f"{self.name} was not started for answers that are held to a pattern")
        encoded = [self._prepare(prompt, room=1) for prompt in prompts]
        async with self._request():
            return await all_of(self._continue(prompt, sampling, row) for row, prompt in enumerate(encoded))

    async def score_tokens(self, prompt: Prompt, continuations: Sequence[Prompt]) -> tuple[list[list[TokenScore]], int]:
        """First tokens are read off one prefill of the prompt; those behind them find it in the prefix cache."""
        if not continuations:
            return [], self.weight_version
        encoded = self._encode_scored(continuations)
        known = self._prepare(prompt, room=max(map(len, encoded)))
        async with self._request():
            first, version = await self._score_first(known, sorted({tokens[0] for tokens in encoded}))
            rest = await all_of(self._score_rest(known, tokens) for tokens in encoded)
        scores = [[first[tokens[0]], *more] for tokens, (more, _) in zip(encoded, rest, strict=True)]
        return scores, min([version, *(found for more, found in rest if more)])

    async def load_weights(self, folder: Path, version: int) -> None:
        kept = self._replaceable()

        async def load() -> None:
            await asyncio.to_thread(read_weights, self._started.module, folder)
            await self._switch(await asyncio.to_thread(kept.keep, folder), version)

        await self._update(load())

    async def patch_weights(self, patches: Path, *, base: int, version: int) -> None:
        kept = self._replaceable()
        if not self.can_patch:
            raise EngineError(f"{self.name} takes no patches in place: load the whole of version {version}")

        async def patch() -> None:
            if base != self._version:
                raise EngineError(f"{patches} changes version {base}, but {self.name} serves version {self._version}")
            await asyncio.to_thread(lambda: check_patches(self._started.module, read_patches(patches)))
            await self._switch(await asyncio.to_thread(kept.keep_patch, patches), version)

        await self._update(patch())

    @contextlib.asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        """One place in the bounded queue, for a bounded time. Leaving early aborts the work in the engine core."""
        if self.failure:
            raise EngineError(self.failure)
        if len(self._requests) >= self._settings.max_queued_requests:
            raise OverloadedError(f"{len(self._requests)} requests wait for {self.name}: engine.max_queued_requests")
        limit = asyncio.timeout(self._settings.timeout_s)
        self._requests.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError as exc:
            late = f"{self.name} gave no answer within engine.timeout_s = {self._settings.timeout_s}"
            raise EngineError(self._failure or late) from exc
        finally:
            self._requests.discard(limit)

    def _fail(self, failure: str) -> None:
        """For good. Requests in flight fail now instead of at their time limit."""
        self._failure = self._failure or failure
        _log.info("engine ended: %s", self._failure)
        for limit in self._requests:
            limit.reschedule(asyncio.get_running_loop().time())

    async def _ask(self, prompt: Tokens, **options: Any) -> Any:
        return await self._core.ask(prompt, salt=str(self._num_loads), **options)

    async def _continue(self, prompt: Tokens, sampling: Sampling, row: int) -> list[Generation]:
        # vLLM takes one greedy sample at a time, and all of them would be the same.
        num_asked = sampling.num_samples if sampling.temperature > 0 else 1
        answer = await self._ask(
            prompt,
            n=num_asked,
            max_tokens=min(sampling.bound(row), self._core.max_tokens - len(prompt)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=_spread_seed(sampling.seed + row),
            stop_token_ids=sorted(self._started.eos_token_ids),
            **held_to(sampling.pattern),
        )
        return [self._sample(prompt, output) for output in answer.outputs] * (sampling.num_samples // num_asked)

    def _sample(self, prompt: Tokens, output: Any) -> Generation:
        if output.finish_reason not in ("length", "stop"):
            raise EngineError(f"{self.name} ended a sample with {output.finish_reason!r}")
        return self._generation(prompt, tuple(output.token_ids), output.finish_reason, oldest_version(output))

    async def _score_first(self, prompt: Tokens, wanted: Sequence[int]) -> tuple[dict[int, TokenScore], int]:
        """Per wanted token its score right after the prompt."""
        scores: dict[int, TokenScore] = {}
        versions = []
        for start in range(0, len(wanted), MAX_SCORED_TOKENS):
            some = list(wanted[start : start + MAX_SCORED_TOKENS])
            answer = await self._ask(prompt, max_tokens=1, temperature=0.0, logprob_token_ids=some)
            scores |= next_token_scores(answer, some)
            versions.append(oldest_version(answer.outputs[0]))
        return scores, min(versions)

    async def _score_rest(self, prompt: Tokens, tokens: Tokens) -> tuple[list[TokenScore], int]:
        """Of all tokens but the first: the last one is scored as next token, those between as tokens of the prompt."""
        if len(tokens) == 1:
            return [], 0
        between, last = tokens[1:-1], tokens[-1]
        options: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": [last]}
        if between:
            # By itself vLLM leaves the cache alone where prompt log-probs are asked for: cached tokens have none.
            options |= {"prompt_logprobs": 1, "skip_reading_prefix_cache": False}
        answer = await self._ask(prompt + tokens[:-1], **options)
        if between and answer.num_cached_tokens > len(prompt):
            # The same tokens were scored before: some of those between were cached too.
            answer = await self._ask(prompt + tokens[:-1], **options | {"skip_reading_prefix_cache": True})
        scores = prompt_token_scores(answer, between) if between else []
        return [*scores, next_token_scores(answer, [last])[last]], oldest_version(answer.outputs[0])

    async def _update(self, work: Coroutine[Any, Any, None]) -> None:
        """One after the other, in order, each to its end even if the caller gives up: half an update must not be
        left alone."""

        async def in_turn() -> None:
            async with self._updating:
                await work

        task = asyncio.create_task(in_turn())
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        await asyncio.shield(task)

    async def _switch(self, kept: Kept, version: int) -> None:
        """From what is served to `kept`. Generation pauses meanwhile."""
        assert self._kept is not None
        began = time.perf_counter()
        await self._pause(kept)
        try:
            await self._apply(kept, version, served=self._kept.served)
        except EngineError as exc:
            self._kept.drop(kept)
            await self._go_back(exc)
            raise EngineError(
                f"weight version {version} could not be applied, version {self._version} is back in service: {exc}"
            ) from exc
        await self._go_on(version)
        metrics.weight_load_seconds.labels("pause").observe(time.perf_counter() - began)
        await asyncio.to_thread(self._kept.serve, kept)

    async def _pause(self, kept: Kept) -> None:
        assert self._kept is not None
        try:
            await self._core.pause()
        except EngineError:
            # It may still come to pause; nothing has changed.
            self._kept.drop(kept)
            await self._go_on(self._version)
            raise

    async def _apply(self, kept: Kept, version: int, *, served: Kept | None) -> None:
        """All files of `kept`, or those that it has more than `served`."""
        if served is None or kept.folder != served.folder:
            await self._core.transfer("full", kept.folder, version=version)
        for patch in kept.patches:
            if served is None or patch not in served.patches:
                await self._patch(patch, version)

    async def _patch(self, patch: Path, version: int) -> None:
        try:
            await self._core.transfer("patch", patch, version=version)
        except EngineError:
            self._core.can_patch = False
            raise

    async def _go_back(self, cause: EngineError) -> None:
        """Load the last good weights again. An engine that can't do even that never answers again."""
        assert self._kept is not None
        served = self._kept.served
        try:
            await asyncio.to_thread(read_weights, self._started.module, served.folder)
            await self._apply(served, self._version, served=None)
        except EngineError as exc:
            self._fail(f"{self.name} lost its weights: an update failed ({cause}), and so did going back ({exc})")
            raise EngineError(self._failure) from exc
        await self._go_on(self._version)

    async def _go_on(self, version: int) -> None:
        self._version = version
        self._num_loads += 1
        try:
            await self._core.go_on()
        except EngineError as exc:
            self._fail(f"{self.name} can't go on after a weight update: {exc}")
            raise EngineError(self._failure) from exc

    def _replaceable(self) -> KeptWeights:
        if self.failure:
            raise EngineError(self.failure)
        if self._kept is None:
            raise self._starting()
        if self._settings.lora_adapter:
            raise EngineError(f"{self.name} has an adapter on its weights: they can't be replaced")
        return self._kept

    @property
    def _started(self) -> ModelOutline:
        if self._outline is None:
            raise self._starting()
        return self._outline

    @property
    def _vocab_size(self) -> int:
        return self._started.vocab_size

    @property
    def _eos_token_ids(self) -> frozenset[int]:
        return self._started.eos_token_ids

    @property
    def _max_tokens(self) -> int:
        return self._core.max_tokens


def _spread_seed(seed: int) -> int:
    """vLLM counts on from a request's seed for its samples, so those of rows must not lie side by side: sample 1 of
    row 0 would draw like sample 0 of row 1."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
