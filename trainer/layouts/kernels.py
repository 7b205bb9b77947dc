"""The attention kernels of the tree layout behind one seam, and `dense`, the slow reference of the others."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from trainer.layouts.shape import TreeShape


class Kernel(Protocol):
    attention_implementation: str
    """Of transformers."""
    block: int
    """Trunks and branches are padded to a multiple of this."""
    bucket: int
    """And the whole row to a multiple of this."""

    def arguments(self, shape: TreeShape, device: torch.device) -> Mapping[str, Any]:
        """For the model's forward."""


class Dense:
    """A boolean mask (1, 1, S, S) through stock SDPA. transformers passes a 4-D mask on as it is."""

    attention_implementation = "sdpa"
    block = bucket = 1

    def arguments(self, shape: TreeShape, device: torch.device) -> Mapping[str, Any]:
        places, tokens = shape.places().to(device), torch.arange(shape.num_tokens, device=device)
        return {"attention_mask": places.attends(tokens[:, None], tokens[None, :])[None, None]}
