"""A model's folder for `from_pretrained`, written from a stream of tensors. Used by checkpoint.py.

    folder = ModelFolder.of(model, tokenizer)            # training thread: copies the configuration
    folder.write(path, snapshot.tensors())               # background thread: one file of weights in memory at most

`save_pretrained` can't write it: it needs the whole model at once, and of a sharded one it sees DTensors.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

_MAX_FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ModelFolder:
    config: PreTrainedConfig
    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    max_file_bytes: int = _MAX_FILE_BYTES

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> "ModelFolder":
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        return cls(config, copy.deepcopy(model.generation_config) if model.can_generate() else None, tokenizer)

    def write(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Raises OSError or SafetensorError."""
        folder.mkdir()
        self.config.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        files, num_bytes = self._write_files(folder, tensors)
        _name(folder, files, num_bytes)

    def _write_files(self, folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> tuple[list[list[str]], int]:
        """The names in each file, and bytes in all."""
        files: list[list[str]] = []
        pending: dict[str, Tensor] = {}
        in_file = num_bytes = 0
        for name, tensor in tensors:
            if pending and in_file + tensor.nbytes > self.max_file_bytes:
                files.append(_write_file(folder, len(files), pending))
                pending, in_file = {}, 0
            pending[name] = tensor.contiguous()
            in_file += tensor.nbytes
            num_bytes += tensor.nbytes
        files.append(_write_file(folder, len(files), pending))
        return files, num_bytes


def _write_file(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / f"{number}.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _name(folder: Path, files: list[list[str]], num_bytes: int) -> None:
    """As transformers names them; an index if there are several."""
    if len(files) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
