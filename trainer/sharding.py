"""A model over all ranks by FSDP2, or as it is for a lone process. Called by policy.py.

    model = distribute(whole, ranks=ranks, ...)    # `whole`: rank 0's copy on its CPU, None elsewhere

Every layer is a unit of its own and the rest of the model (embeddings, last norm, head) another one, so that its
parameters are gathered when `SuffixLogProbs` is called. The master weights stay in the dtype they were loaded in;
forward and backward use `compute_dtype`, and gradients are summed in float32. Losses are normalised by the count over
all ranks, so gradients are *summed* over ranks where FSDP2 would average.

The ranks build the model on the meta device, shard it, and take their shards from rank 0 tensor by tensor: no rank
holds a whole model on its device, and only rank 0 one in memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from trainer.log_probs import SuffixLogProbs
from trainer.ranks import Ranks


@dataclass(frozen=True)
class Precision:
    weights: torch.dtype
    compute: torch.dtype


@dataclass(frozen=True)
class _Blueprint:
    """What the other ranks need to know about rank 0's model."""

    config: PreTrainedConfig
    attention: str
    buffers: dict[str, torch.Tensor]
    """All of them: those that are in no file too, such as rotary frequencies."""


def distribute(
    whole: PreTrainedModel | None, *, ranks: Ranks, precision: Precision, frozen: bool, compile: bool
) -> SuffixLogProbs:
    """A rank's share of the model, in evaluation mode."""
    if ranks.size == 1:
        assert whole is not None
        model = whole.to(ranks.device)  # type: ignore[arg-type]
    else:
        blueprint = ranks.broadcast(_blueprint(whole) if whole is not None else None)
        model = _on_meta(blueprint, precision.weights)
    model.train(False).requires_grad_(not frozen)
    if compile:
        for layer in layers(model):
            layer.compile()
    root = SuffixLogProbs(model)
    if ranks.size > 1 or precision.compute != precision.weights:
        _shard(root, ranks, precision.compute, frozen=frozen)
    if ranks.size > 1:
        with ranks.guarding("loading the weights"):
            _fill(model, whole, blueprint.buffers, ranks)
    return root


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: those that transformers can checkpoint, without layers inside of layers."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append((name, module))
    return [module for _, module in found]


def _blueprint(whole: PreTrainedModel) -> _Blueprint:
    attention = str(whole.config._attn_implementation)
    return _Blueprint(whole.config, attention, {name: buffer.cpu() for name, buffer in whole.named_buffers()})


def _on_meta(blueprint: _Blueprint, dtype: torch.dtype) -> PreTrainedModel:
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(blueprint.config, dtype=dtype, attn_implementation=blueprint.attention)
    assert isinstance(model, PreTrainedModel)
    return model


def _shard(root: SuffixLogProbs, ranks: Ranks, compute: torch.dtype, *, frozen: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for layer in layers(root.model):
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    # a frozen root is gathered anew for every forward: its shards change when the reference is refreshed
    fully_shard(root, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True if frozen else None)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _fill(
    model: PreTrainedModel, whole: PreTrainedModel | None, buffers: dict[str, torch.Tensor], ranks: Ranks
) -> None:
    model.to_empty(device=ranks.device)
    model.tie_weights()
    full = dict(whole.state_dict()) if whole is not None else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, full, options=options)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Shard by shard, cast to the target's dtype."""
    given = source.state_dict()
    for name, tensor in target.state_dict().items():
        local(tensor).copy_(local(given[name]))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, or the tensor itself if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
