"""Tree attention on CUDA: FlexAttention with a block mask that is written down, not searched for.

Trunks and branches are whole blocks of 128, so a row block attends to

    of its own segment: the blocks before it in full, itself in part (the diagonal)
    of the trunk, for a branch: the blocks before the start in full, and one in part if the start is inside a block

The whole row is padded to a multiple of `bucket`, so that few lengths are compiled. transformers passes a 4-D BlockMask
on as it is. There is no backward on the CPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from trainer.layouts.shape import Segment, TreeShape

BLOCK = 128
"""FlexAttention's own."""


class Flex:
    attention_implementation = "flex_attention"
    block = BLOCK
    bucket = 8 * BLOCK

    def arguments(self, shape: TreeShape, device: torch.device) -> Mapping[str, Any]:
        return {"attention_mask": block_mask(shape, device)}


def block_mask(shape: TreeShape, device: torch.device) -> BlockMask:
    """(1, 1, S, S). Every segment is a multiple of BLOCK."""
    rows = [row for segment in shape.segments for row in _rows(segment)]
    places = shape.places().to(device)

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return places.attends(query, key)

    return BlockMask.from_kv_blocks(
        *_table([partial for _, partial in rows], device),
        *_table([full for full, _ in rows], device),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(shape.num_tokens, shape.num_tokens),
    )


def _rows(segment: Segment) -> list[tuple[list[int], list[int]]]:
    """For each of its row blocks the key blocks that it sees in full, and those in part."""
    own, trunk = segment.begin // BLOCK, segment.trunk // BLOCK
    whole, rest = divmod(segment.start, BLOCK)
    full, partial = list(range(trunk, trunk + whole)), [trunk + whole] if rest else []
    return [([*full, *range(own, own + index)], [*partial, own + index]) for index in range(segment.length // BLOCK)]


def _table(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row blocks (R) -> how many key blocks each has (1, 1, R), and which (1, 1, R, R); the rest of a row is 0."""
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    indices = torch.zeros(len(rows), len(rows), dtype=torch.int32)
    for row, blocks in zip(indices, rows, strict=True):
        row[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)
