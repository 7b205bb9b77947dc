"""The checkpoint's own names of a model's tensors, where the model keeps them otherwise in memory.

    Qwen3-MoE in memory    model.layers.0.mlp.experts.gate_up_proj (E, 2I, H)
    in its checkpoint      model.layers.0.mlp.experts.0.gate_proj.weight (I, H), ..., E times, and up_proj

Transformers converts while it loads and reverts the whole state at once when it saves. Here the state is cut into the
smallest *groups* that can be reverted alone, so that one group at a time is in memory. Tied weights are kept once, by
the model's own tied keys. Used by trainer/snapshot.py and services/engine/weights.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class NameGroup:
    names: tuple[str, ...]
    """In memory."""
    renamed: str
    """In the checkpoint, of the only tensor; empty: the tensors themselves are converted, into one or several."""

    def to_checkpoint(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Name in the checkpoint -> tensor. `tensors`: those of `names`, whole; on the meta device for layouts only."""
        if self.renamed:
            yield self.renamed, tensors[self.names[0]]
        else:
            yield from revert_weight_conversion(model, {name: tensors[name] for name in self.names}).items()


def untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_pretrained` would write, by the names in memory. Tensors share the model's memory."""
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def name_groups(model: PreTrainedModel) -> list[NameGroup]:
    """Of `untied_state`, the widest dtype first: in this order a safetensors file keeps every tensor aligned."""
    state = untied_state(model)
    renamings, converters = _reversed_conversions(model)
    groups: dict[str, list[str]] = {}
    converted = set()
    for name in state:
        renamed, pattern = rename_source_key(name, renamings, converters, reverse=True)
        groups.setdefault(renamed, []).append(name)
        if pattern is not None:
            converted.add(renamed)
    found = [NameGroup(tuple(names), "" if key in converted else key) for key, names in groups.items()]
    return sorted(found, key=lambda group: -state[group.names[0]].itemsize)


def keeps_other_names(module: Any) -> bool:
    """Whether a model's names in memory are not its checkpoint's."""
    if not isinstance(module, PreTrainedModel):
        return False
    return any(group.names != (group.renamed,) for group in name_groups(module))


def _reversed_conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """Renamings and converters from memory to checkpoint: the ones that `revert_weight_conversion` uses."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not made by `from_pretrained`
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
    back = [conversion.reverse_transform() for conversion in conversions[::-1]]
    renamings = [conversion for conversion in back if isinstance(conversion, WeightRenaming)]
    return renamings, [conversion for conversion in back if isinstance(conversion, WeightConverter)]


def checkpoint_layouts(
    model: PreTrainedModel, dtype: torch.dtype | None = None
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """By the checkpoint's names, in the order of `name_groups`; floating tensors as `dtype` if one is given."""
    state = untied_state(model)
    meta = {
        name: torch.empty(tensor.shape, dtype=rounded(tensor, dtype), device="meta") for name, tensor in state.items()
    }
    found = {}
    for group in name_groups(model):
        for name, tensor in group.to_checkpoint(model, meta):
            found[name] = (tensor.dtype, tensor.shape)
    return found


def rounded(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a tensor of a state whose floating tensors become `dtype`."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
