"""What can be known of a model without loading its weights. For engines whose weights lie in another process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from shared.errors import EngineError


@dataclass(frozen=True)
class ModelOutline:
    """Read from a model's configuration files alone."""

    module: Any
    """A transformers causal language model on the meta device: names, shapes and ties, no memory."""
    vocab_size: int
    eos_token_ids: frozenset[int]


def read_outline(model: str) -> ModelOutline:
    """Of a Hugging Face folder or name. Raises EngineError with the reason."""
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            module = cast(Any, AutoModelForCausalLM).from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise EngineError(f"engine.model {model!r} can't be loaded: {exc}") from exc
    return ModelOutline(module, config.get_text_config(decoder=True).vocab_size, _eos_token_ids(model, config))


def local_folder(model: str) -> Path:
    """Where the safetensors files of a model that was loaded before lie."""
    if Path(model).is_dir():
        return Path(model).resolve()
    return Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))


def _eos_token_ids(model: str, config: Any) -> frozenset[int]:
    """The generation settings' where they name any, otherwise the model's."""
    try:
        generation = GenerationConfig.from_pretrained(model)
    except OSError:
        generation = None  # the file is optional
    for source in (generation, config.get_text_config(decoder=True)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
