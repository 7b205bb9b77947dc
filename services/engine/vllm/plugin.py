"""The transfer engine in vLLM's worker processes that brings new weights into a running model.

vLLM calls `register` in every process it spawns (entry point `headwater`, group `vllm.general_plugins`); core.py
selects the backend. vLLM's own backends receive tensors over NCCL or CUDA IPC; this one reads safetensors files, so
that trainer and replica need no common network.
"""

import logging
import multiprocessing
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.engine.weights import read_patches

BACKEND = "headwater_files"


def register() -> None:
    """Entry point. vLLM may call it several times in a process, and its registry refuses duplicates."""
    # It would warn at every update of layers without a tensor of their name; completeness was checked before.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileTransferEngine)
        _end_with_parent()


def _end_with_parent() -> None:
    """vLLM's engine core would outlive a killed service and keep the model's memory."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, name="parent", daemon=True).start()


@dataclass
class NoInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing to connect to."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One update: a folder of safetensors files with all tensors, or one file of patches."""

    form: Literal["full", "patch"]
    path: str


class FileTransferEngine(WeightTransferEngine[NoInit, FileUpdate]):  # type: ignore[misc]
    """Applies an update while generation is paused. The caller has checked names and shapes.

    A full update goes through vLLM's layerwise reload, which unpacks, loads and packs the weights again (a CPU keeps
    linear weights packed only). A patch is written in place.
    """

    init_info_cls = NoInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: NoInit) -> None: ...
    def start_weight_update(self) -> None: ...
    def finish_weight_update(self) -> None: ...
    def shutdown(self) -> None: ...

    def receive_weights(self, update_info: FileUpdate) -> None:
        if update_info.form == "full":
            self._load(Path(update_info.path))
        else:
            self._patch(Path(update_info.path))

    def _load(self, folder: Path) -> None:
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(_tensors(folder))
        finally:
            # After a failure too: a half loaded layer would count its tensors twice in the next load.
            finalize_layerwise_reload(self.model, self.model_config)
        _pack_tied_heads(self.model)

    def _patch(self, file: Path) -> None:
        patches = []
        for patch in read_patches(file):
            placed = {"values": patch.values.to(self.device), "indices": patch.indices.to(self.device)}
            dtype = patch.values.dtype
            patches.append(CheckpointWeightPatch(name=patch.name, shape=patch.shape, dtype=dtype, **placed))
        with torch.no_grad():
            load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)


def _pack_tied_heads(model: Any) -> None:
    """vLLM's reload skips layers without a tensor of their name, such as an output layer tied to the embedding. On a
    CPU that layer computes with a packed copy, which still holds the old weights."""
    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def _tensors(folder: Path) -> Any:
    """(name, tensor) pairs, files in order."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors file in {folder}")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (a safetensors file is no dict)
                tensor: Tensor = opened.get_tensor(name)
                yield name, tensor
