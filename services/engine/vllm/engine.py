"""The production engine: vLLM in this process. vLLM's own HTTP routes, which check no token, stay closed.

    generate, score --core.py--> AsyncLLM --> engine core (another process: scheduler and model)
    load_weights: check -> pause, requests kept -> transfer (plugin.py) -> resume

The prefix cache never serves keys of old weights: the pause clears it, and each request carries the number of weight
loads as salt. Requests in flight continue after an update with recomputed keys. An update that fails half way is
undone by loading the last good files again before anything is sampled.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from services.concurrency import all_of
from services.engine.base import Generation, Prompt, Sampling, Tokens, TokenScore
from services.engine.local import LocalEngine, LocalModel, end_token_ids
from services.engine.vllm.arguments import speculates
from services.engine.vllm.core import (
    MAX_SCORED_TOKENS,
    VllmCore,
    installed_version,
    listed_log_probs,
    next_token_scores,
    oldest_version,
    pattern_options,
    prompt_token_scores,
)
from services.engine.weights import read_patches, read_weights
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, OverloadedError, PromptError
from shared.seeds import derive_seed

_log = logging.getLogger(__name__)


class VllmEngine(LocalEngine):
    """See `Engine`. Also a `TokenScorer`, a `PatchableEngine` and a `FallibleEngine`."""

    def __init__(
        self, settings: EngineSettings, *, tokenizer: str = "", constrains: bool = False, adapters: Sequence[str] = ()
    ) -> None:
        """As in `build_engine`. SettingsError if vLLM is missing or of an unsupported version."""
        adapter = f"+{settings.lora_adapter}" if settings.lora_adapter else ""
        super().__init__(settings, name=f"vllm:{settings.model}{adapter}", tokenizer=tokenizer)
        self._installed = installed_version()
        self.can_constrain = constrains
        # With speculative decoding vLLM's sampler breaks down on requests for the log-probs of given tokens.
        self.can_score = self.can_grade = not speculates(settings)
        self._adapters = tuple(name for name in dict.fromkeys([settings.lora_adapter, *adapters]) if name)
        read_by_vllm = self._tokenizer_source if constrains else ""
        self._core = VllmCore(settings, tokenizer=read_by_vllm, adapters=self._adapters)
        self._served: tuple[Path, ...] = ()
        """What restores the weights in service: a folder of all tensors, then patches in order."""
        self._requests: set[asyncio.Timeout] = set()
        self.weight_version = 0
        self._num_loads = 0
        self._updating = asyncio.Lock()
        self._updates: set[asyncio.Task[None]] = set()
        self._failure = ""

    @property
    def can_patch(self) -> bool:
        """Not on a CPU, nor after a patch has failed: the model's loader may not support it."""
        return self._core.can_patch

    @property
    def failure(self) -> str:
        if not self._failure and self._core.is_dead:
            self._failure = f"{self.name} has died: its engine core's last lines are in the log"
        return self._failure

    async def start(self) -> None:
        source = self._settings.model
        await self._load_tokenizer()
        outline = await asyncio.to_thread(_read_outline, source)
        await self._core.start()
        self._served = (await asyncio.to_thread(_local_folder, source),)
        self._model = replace(outline, max_tokens=self._core.max_tokens)
        _log.info("model loaded", extra={"model": source, "vllm": self._installed, "max_tokens": self._core.max_tokens})

    async def close(self) -> None:
        self._fail(f"{self.name} is closed")
        await self._core.close()

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Generation]]:
        if not prompts:
            return []
        if sampling.pattern and not self.can_constrain:
            raise PromptError(f"{self.name} was not started for answers that follow a pattern")
        encoded = [self._prepare(prompt, room=1) for prompt in prompts]
        async with self._request():
            return await all_of(self._continue(prompt, sampling, row) for row, prompt in enumerate(encoded))

    async def score_tokens(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, adapter: str = ""
    ) -> tuple[list[list[TokenScore]], int]:
        """One prefill of the prompt scores the first tokens; the requests for the rest find it in the prefix cache."""
        if not continuations:
            return [], self.weight_version
        if not self.can_score:
            raise PromptError(f"{self.name} gives no log-probs with speculative decoding: set engine.ngram_tokens to 0")
        encoded = self._encode_scored(continuations)
        known = self._prepare(prompt, room=max(map(len, encoded)))
        async with self._request():
            first, version = await self._score_first(known, sorted({tokens[0] for tokens in encoded}), adapter=adapter)
            rest = await all_of(self._score_rest(known, tokens, adapter=adapter) for tokens in encoded)
        scores = [[first[tokens[0]], *more] for tokens, (more, _) in zip(encoded, rest, strict=True)]
        return scores, min([version, *(found for more, found in rest if more)])

    async def load_weights(self, folder: Path, version: int) -> None:
        self._check_replaceable()

        async def load() -> None:
            await asyncio.to_thread(read_weights, self._started.module, folder)
            await self._switch("full", folder, version=version)

        await self._update(load())

    async def patch_weights(self, patches: Path, *, base: int, version: int, last_good: Sequence[Path]) -> None:
        self._check_replaceable()
        if not self.can_patch:
            raise EngineError(f"{self.name} takes no patches in place: load the whole of version {version}")

        async def patch() -> None:
            if base != self.weight_version:
                served = f"{self.name} serves version {self.weight_version}"
                raise EngineError(f"{patches} changes version {base}, but {served}")
            await asyncio.to_thread(read_patches, patches, module=self._started.module)
            self._served = tuple(last_good)
            await self._switch("patch", patches, version=version)

        await self._update(patch())

    @contextlib.asynccontextmanager
    async def _request(self) -> AsyncIterator[None]:
        """One place in the bounded queue, for a bounded time. Leaving aborts the work in the engine core."""
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
        """For good. Requests in flight fail now, not at their time limit."""
        self._failure = self._failure or failure
        _log.info("engine ended: %s", self._failure)
        for limit in self._requests:
            limit.reschedule(asyncio.get_running_loop().time())

    async def _ask(self, prompt: Tokens, *, adapter: str, **options: Any) -> Any:
        chosen = adapter or self._settings.lora_adapter
        return await self._core.ask(prompt, salt=str(self._num_loads), adapter=chosen, **options)

    async def _continue(self, prompt: Tokens, sampling: Sampling, row: int) -> list[Generation]:
        # vLLM refuses several greedy samples; they would all be the same.
        num_asked = sampling.num_samples if sampling.temperature > 0 else 1
        words = sampling.words if self.can_grade else ()
        answer = await self._ask(
            prompt,
            adapter=sampling.adapter,
            n=num_asked,
            max_tokens=min(sampling.bound(row), self._started.max_tokens - len(prompt)),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            # vLLM seeds sample n with `seed + n`: seeds of neighbouring rows must lie far apart.
            seed=derive_seed(sampling.seed + row, bits=56),
            stop_token_ids=sorted(self._started.eos_token_ids),
            logprob_token_ids=list(self._watched(words)) or None,
            **pattern_options(sampling.pattern),
        )
        samples = [self._sample(prompt, output, words) for output in answer.outputs]
        return samples * (sampling.num_samples // num_asked)

    def _sample(self, prompt: Tokens, output: Any, words: tuple[str, ...]) -> Generation:
        if output.finish_reason not in ("length", "stop"):
            raise EngineError(f"{self.name} ended a sample with {output.finish_reason!r}")
        log_probs = listed_log_probs(output, self._watched(words))
        shown = (tuple(output.token_ids), output.finish_reason, oldest_version(output))
        return self._generation(prompt, *shown, words=words, log_probs=log_probs)

    async def _score_first(
        self, prompt: Tokens, wanted: Sequence[int], *, adapter: str
    ) -> tuple[dict[int, TokenScore], int]:
        """The score of each wanted token right after the prompt."""
        scores: dict[int, TokenScore] = {}
        versions = []
        for start in range(0, len(wanted), MAX_SCORED_TOKENS):
            some = list(wanted[start : start + MAX_SCORED_TOKENS])
            answer = await self._ask(prompt, adapter=adapter, max_tokens=1, temperature=0.0, logprob_token_ids=some)
            scores |= next_token_scores(answer, some)
            versions.append(oldest_version(answer.outputs[0]))
        return scores, min(versions)

    async def _score_rest(self, prompt: Tokens, tokens: Tokens, *, adapter: str) -> tuple[list[TokenScore], int]:
        """Scores of all but the first token: the last one as next token, those before it as tokens of the prompt."""
        if len(tokens) == 1:
            return [], 0
        between, last = tokens[1:-1], tokens[-1]
        options: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": [last], "adapter": adapter}
        if between:
            # By default vLLM bypasses the cache for prompt log-probs, since cached tokens have none.
            options |= {"prompt_logprobs": 1, "skip_reading_prefix_cache": False}
        answer = await self._ask(prompt + tokens[:-1], **options)
        if between and answer.num_cached_tokens > len(prompt):
            # The same tokens were scored before, so some of `between` were cached too.
            answer = await self._ask(prompt + tokens[:-1], **options | {"skip_reading_prefix_cache": True})
        scores = prompt_token_scores(answer, between) if between else []
        return [*scores, next_token_scores(answer, [last])[last]], oldest_version(answer.outputs[0])

    async def _update(self, work: Coroutine[Any, Any, None]) -> None:
        """One at a time, in order, and each to its end, even if the caller gives up: no update stays half done."""

        async def in_turn() -> None:
            async with self._updating:
                await work

        task = asyncio.create_task(in_turn())
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)
        await asyncio.shield(task)

    async def _switch(self, form: Literal["full", "patch"], path: Path, *, version: int) -> None:
        """Put checked files into service. Generation pauses meanwhile."""
        began = time.perf_counter()
        await self._pause()
        try:
            await self._core.transfer(form, path, version=version)
        except EngineError as exc:
            if form == "patch":
                self._core.can_patch = False
            await self._go_back(exc)
            back = f"version {self.weight_version} is back in service"
            raise EngineError(f"weight version {version} could not be applied, {back}: {exc}") from exc
        self._served = (path,) if form == "full" else (*self._served, path)
        await self._resume(version)
        metrics.weight_load_seconds.labels("pause").observe(time.perf_counter() - began)

    async def _pause(self) -> None:
        try:
            await self._core.pause()
        except EngineError:
            await self._resume(self.weight_version)  # nothing has changed, but it may still come to pause
            raise

    async def _go_back(self, cause: EngineError) -> None:
        """Load the last good weights again; if that fails too, the engine has failed for good."""
        folder, *patches = self._served
        try:
            await asyncio.to_thread(read_weights, self._started.module, folder)
            await self._core.transfer("full", folder, version=self.weight_version)
            for patch in patches:
                await self._core.transfer("patch", patch, version=self.weight_version)
        except EngineError as exc:
            self._fail(f"{self.name} lost its weights: an update failed ({cause}), and so did going back ({exc})")
            raise EngineError(self._failure) from exc
        await self._resume(self.weight_version)

    async def _resume(self, version: int) -> None:
        self.weight_version = version
        self._num_loads += 1
        try:
            await self._core.resume()
        except EngineError as exc:
            self._fail(f"{self.name} can't resume after a weight update: {exc}")
            raise EngineError(self._failure) from exc

    def _check_replaceable(self) -> None:
        if self.failure:
            raise EngineError(self.failure)
        _ = self._started
        if self._adapters:
            raise EngineError(f"{self.name} has an adapter on its weights: they can't be replaced")


def _read_outline(model: str) -> LocalModel:
    """From the configuration files of a folder or name; `max_tokens` is left 0. EngineError if they can't be read."""
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            module = cast(Any, AutoModelForCausalLM).from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise EngineError(f"engine.model {model!r} can't be loaded: {exc}") from exc
    decoder = config.get_text_config(decoder=True)
    generation = None
    with contextlib.suppress(OSError):  # the file is optional
        generation = GenerationConfig.from_pretrained(model)
    return LocalModel(module, decoder.vocab_size, 0, end_token_ids(generation, decoder))


def _local_folder(model: str) -> Path:
    """Of a loaded model's safetensors files."""
    if Path(model).is_dir():
        return Path(model).resolve()
    return Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
