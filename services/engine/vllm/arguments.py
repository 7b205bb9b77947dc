"""The engine arguments that vLLM is started with, and the environment that its processes need. Called by core.py."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from shared.engine_settings import EngineSettings
from shared.errors import EngineError, SettingsError

_PLUGINS = "vllm.general_plugins"
_CPU_KV_CACHE_GIB = 1.0
_CPU_BLOCK_TOKENS = 32
"""The smallest block that is fast in vLLM's CPU attention; with the default of 128, short prefixes share nothing."""
_MAX_NGRAM, _MIN_NGRAM = 4, 2
"""Tokens looked up in the prompt: the last 4, or as few as 2, whose earlier place shows what may come next."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_SETTINGS = {
    "model": "engine.model",
    "dtype": "engine.dtype",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_gib",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "data_parallel_size": "engine.data_parallel_size",
    "max_model_len": "engine.max_model_tokens",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "enable_lora": "lora_adapter",
    "max_loras": "lora_adapter",
    "max_lora_rank": "lora_adapter",
}
"""Arguments with a setting of their own, which sets them."""


@dataclass(frozen=True)
class Arguments:
    settings: EngineSettings
    adapters: Sequence[str]
    """Folders of LoRA adapters, distinct; with any of them the weights can't be replaced."""
    tokenizer: str
    """Folder or name; empty: vLLM loads none."""
    on_cpu: bool

    def build(self) -> Any:
        """AsyncEngineArgs. SettingsError for `engine.engine_arguments` that vLLM does not know or that we set."""
        from vllm.engine.arg_utils import AsyncEngineArgs

        ours = self._general() | self._batches() | (self._for_cpu() if self.on_cpu else {}) | self._weights()
        given = self.settings.engine_arguments
        known = {field.name for field in fields(AsyncEngineArgs)}
        if unknown := sorted(given.keys() - known):
            raise SettingsError(f"engine.engine_arguments: this vLLM knows no {', '.join(unknown)}")
        if taken := sorted(given.keys() & (ours.keys() | _SETTINGS.keys())):
            remedies = (f"{name} (set {_SETTINGS[name]} instead)" if name in _SETTINGS else name for name in taken)
            raise SettingsError(f"engine.engine_arguments: Headwater sets {', '.join(remedies)} itself")
        return AsyncEngineArgs(**ours, **given)

    def _general(self) -> dict[str, Any]:
        same = {"model", "dtype", "gpu_memory_utilization", "tensor_parallel_size", "data_parallel_size"}
        options = self.settings.model_dump(include=same) | {
            "max_model_len": self.settings.max_model_tokens or None,
            # Token ids in, token ids out; the caller names end tokens and sampling settings.
            "skip_tokenizer_init": not self.tokenizer,
            "tokenizer": self.tokenizer or None,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
        }
        if self.settings.kv_cache_gib or self.on_cpu:
            options["kv_cache_memory_bytes"] = int((self.settings.kv_cache_gib or _CPU_KV_CACHE_GIB) * 2**30)
        return options

    def _batches(self) -> dict[str, Any]:
        """vLLM chooses the sizes that are 0, for the usage context of its own server."""
        sizes = self.settings.model_dump(include={"max_num_seqs", "max_num_batched_tokens"})
        options: dict[str, Any] = {name: size for name, size in sizes.items() if size}
        if self.settings.ngram_tokens:
            lookup = {"prompt_lookup_max": _MAX_NGRAM, "prompt_lookup_min": _MIN_NGRAM}
            options["speculative_config"] = {
                "method": "ngram",
                "num_speculative_tokens": self.settings.ngram_tokens,
                **lookup,
            }
        return options

    def _for_cpu(self) -> dict[str, Any]:
        """Without compilation, which needs a compiler, and 20 s at the first request for scores."""
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        options: dict[str, Any] = {"enforce_eager": True, "block_size": _CPU_BLOCK_TOKENS}
        # A prefill in parts rewinds a seeded request's generator. Torch's CPU generators can't: the engine core dies.
        options["enable_chunked_prefill"] = False
        if self.settings.tensor_parallel_size == 1:
            # With the model in the engine core's process there is one process less.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            options["distributed_executor_backend"] = "uni"
        return options

    def _weights(self) -> dict[str, Any]:
        """Adapters, all of which fit into one batch, or replaceable weights."""
        from vllm.config import WeightTransferConfig

        if self.adapters:
            rank = max(_adapter_rank(Path(adapter)) for adapter in self.adapters)
            # On a CPU, vLLM's kernels give requests without an adapter the last slot (index -1): it must stay empty.
            slots = len(self.adapters) + self.on_cpu
            return {"enable_lora": True, "max_loras": slots, "max_lora_rank": rank}
        from services.engine.vllm.plugin import BACKEND, register

        if register.__module__ not in {plugin.module for plugin in entry_points(group=_PLUGINS)}:
            raise EngineError(f"headwater's entry point in {_PLUGINS} is not installed: run `pip install -e .` again")
        return {"weight_transfer_config": WeightTransferConfig(backend=BACKEND)}


def speculates(settings: EngineSettings) -> bool:
    return bool(settings.ngram_tokens or settings.engine_arguments.get("speculative_config"))


def _adapter_rank(adapter: Path) -> int:
    """The smallest of vLLM's rank limits that fits the adapter."""
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        return next(bound for bound in _LORA_RANKS if rank <= bound)
    except (OSError, ValueError, KeyError, StopIteration) as exc:
        raise EngineError(f"lora_adapter {str(adapter)!r} is no LoRA adapter of rank <= 512: {exc!r}") from exc
