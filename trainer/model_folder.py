"""A model's folder for `from_pretrained`, written from a stream of tensors. Used by checkpoint.py.

    folder = ModelFolder.of(model, tokenizer)            # training thread: copies the configuration
    folder.write(path, layouts, snapshot.tensors())      # background thread: tensor by tensor, in files as of a version

`save_pretrained` can't write it: it needs the whole model at once, and of a sharded one it sees DTensors.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from shared.weights.state import FileLayout
from trainer.publication import Layouts, content_of, full_files, named_bits

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

    def write(self, folder: Path, layouts: Layouts, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """`tensors` come in the order of `layouts`. Raises OSError."""
        folder.mkdir()
        self.config.save_pretrained(folder)
        if self.generation is not None:
            self.generation.save_pretrained(folder)
        if self.tokenizer is not None:
            try:
                self.tokenizer.save_pretrained(folder)
            except Exception as exc:  # the tokenizers library raises a plain Exception if it can't write a file
                raise OSError(f"the tokenizer can't be written to {folder}: {exc}") from exc
        files, bits = full_files(layouts, max_bytes=self.max_file_bytes), named_bits(tensors)
        for name, file in files.items():
            with (folder / name).open("wb") as opened:
                opened.writelines(content_of(file, bits))
        if len(files) > 1:
            _write_index(folder, files)


def _write_index(folder: Path, files: Mapping[str, FileLayout]) -> None:
    total_size = sum(file.num_bytes - len(file.header) for file in files.values())
    weight_map = {tensor: name for name, file in files.items() for tensor in file.offsets}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
