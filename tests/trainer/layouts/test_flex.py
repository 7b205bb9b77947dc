"""The block mask against the dense mask and by hand. FlexAttention has a forward on the CPU, but no backward."""

import pytest
import torch
from torch import Tensor

from tests.tiny_llama import tiny_llama
from tests.trainer.layouts.windows import CPU, pair, some_pairs, the_only_pass
from trainer.layouts.base import WindowPairs
from trainer.layouts.flex import BLOCK, Flex, block_mask
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.shape import Segment, TreeShape
from trainer.layouts.tree import TreeLayout
from trainer.log_probs import SuffixLogProbs

ALIGNED = TreeShape((Segment(0, 384, 0), Segment(384, 512, 0, 128), Segment(512, 768, 0, 256)))
INSIDE = TreeShape((Segment(0, 256, 0), Segment(256, 384, 256), Segment(384, 640, 0, 130), Segment(640, 768, 256, 5)))


def dense(shape: TreeShape) -> Tensor:
    """Token by token, written once more."""
    mask = torch.zeros(shape.num_tokens, shape.num_tokens, dtype=torch.bool)
    for one in shape.segments:
        mask[one.begin : one.end, one.begin : one.end] = torch.ones(one.length, one.length).tril().bool()
        mask[one.begin : one.end, one.trunk : one.trunk + one.start] = True
    return mask


def blocks(counts: Tensor, indices: Tensor) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(indices[0, 0], counts[0, 0].tolist(), strict=True)]


def test_block_lists_by_hand_where_starts_are_at_blocks() -> None:
    mask = block_mask(ALIGNED, CPU)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    assert blocks(mask.full_kv_num_blocks, mask.full_kv_indices) == [[], [0], [0, 1], [0], [0, 1], [0, 1, 4]]
    assert blocks(mask.kv_num_blocks, mask.kv_indices) == [[0], [1], [2], [3], [4], [5]]


def test_a_start_inside_a_block_adds_a_partial_one() -> None:
    mask = block_mask(INSIDE, CPU)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    assert blocks(mask.full_kv_num_blocks, mask.full_kv_indices) == [[], [0], [], [0], [0, 3], []]
    assert blocks(mask.kv_num_blocks, mask.kv_indices) == [[0], [1], [2], [1, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("shape", [ALIGNED, INSIDE])
def test_the_block_mask_is_the_dense_mask(shape: TreeShape) -> None:
    expected, mask = dense(shape), block_mask(shape, CPU)
    tokens = torch.arange(shape.num_tokens)
    assert torch.equal(mask.mask_mod(tokens[:0].sum(), tokens[:0].sum(), tokens[:, None], tokens[None, :]), expected)
    by_block = expected.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)  # (R, C, 128, 128)
    assert torch.equal(mask.to_dense()[0, 0].bool(), by_block.any(-1).any(-1))
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    full = torch.zeros_like(by_block.any(-1).any(-1))
    for row, columns in enumerate(blocks(mask.full_kv_num_blocks, mask.full_kv_indices)):
        full[row, columns] = True
    assert torch.equal(full, by_block.all(-1).all(-1))


def windows() -> list[WindowPairs]:
    """Starts at and inside blocks, a branch of two blocks, an original."""
    trunk = tuple(1 + (5 * index) % 31 for index in range(300))
    first = (
        pair(trunk, 100, (3,) * 30, (4,) * 150),
        pair(trunk, 128, trunk[128:140], (6, 7)),
        pair(trunk, 259, (9,) * 9, trunk[259:300]),
    )
    return [first, some_pairs()]


def test_rows_are_padded_to_blocks_and_buckets() -> None:
    one = the_only_pass(TreeLayout(Flex()), *windows())
    assert one.num_tokens == 2048  # trunks 3 + 1 blocks, branches 1 + 2 + 1 + 1 and 5: 14, to a multiple of 8
    assert one.position_ids is not None
    assert int(one.position_ids.max()) == 299


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_log_probs_are_those_of_separate_sequences() -> None:
    model = tiny_llama(32, max_position_embeddings=512, head_dim=16)
    expected = SuffixLogProbs(model)(the_only_pass(SeparateLayout(), *windows())).detach()
    layout = TreeLayout(Flex())
    model.set_attn_implementation(layout.attention_implementation)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling for the CPU takes a minute
        found = SuffixLogProbs(model)(the_only_pass(layout, *windows()))
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-5, atol=1e-5)
