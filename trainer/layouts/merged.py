"""Tree attention on the CPU: flash attention part by part, merged by log-sum-exp.

    causal attention in each trunk and branch, equally long ones batched          -> out, lse of every token
    for each start: its branch tokens over the trunk before it, without a mask    -> merged into their out, lse

The backward calls each part's flash backward with the MERGED out and lse. With them a part's probabilities
exp(score - lse) are those of the whole row, so its gradients are exact and add up (Ring Attention, arXiv 2310.01889).
Only query, key, value, out and lse are kept, as by stock flash attention.

torch's flash kernels for the CPU are private: `is_exact` tries them once, and the caller takes `Dense` if they fail.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from trainer.layouts.kernels import Dense
from trainer.layouts.shape import Crossing, Run, Segment, TreeShape

NAME = "headwater_tree"
_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias")


class Merged:
    attention_implementation = NAME
    block = bucket = 1

    def arguments(self, shape: TreeShape, device: torch.device) -> Mapping[str, Any]:
        return {"tree": shape}


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeShape,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """`query` (1, H, S, D), `key` and `value` (1, K, S, D) -> (1, S, H, D). Raises ValueError for what it can't do."""
    if refused := [name for name in _REFUSED if options.get(name) is not None]:
        raise ValueError(f"tree attention has no {refused[0]}: use trainer.layout = 'separate'")
    if dropout:
        raise ValueError(f"tree attention has no dropout, got {dropout}: use trainer.layout = 'separate'")
    out: Tensor = _MergedAttention.apply(query, key, value, tree, scaling)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TreeShape, scaling: float | None) -> Tensor:
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width).transpose(1, 2)
        lse = torch.empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)  # (1, H, S), as the kernel has it
        for run in tree.runs:
            parts = (_batched(each, run) for each in (query, key, value))
            part, part_lse = _flash(*parts, is_causal=True, scaling=scaling)
            _batched(out, run).copy_(part)
            _batched(lse[..., None], run).copy_(part_lse[..., None])
        for one in tree.crossings:
            part, part_lse = _flash(*_crossed(one, query, key, value), is_causal=False, scaling=scaling)
            _merge(out[:, :, one.begin : one.end], lse[:, :, one.begin : one.end], part, part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scaling = tree, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = grads[0]
        sums = [torch.empty_like(each, dtype=torch.float32) for each in (query, key, value)]
        for run in ctx.tree.runs:
            parts = (_batched(each, run) for each in (grad_out, query, key, value, out))
            part_lse = _batched(lse[..., None], run)[..., 0]
            found = _flash_backward(*parts, part_lse, is_causal=True, scaling=ctx.scaling)
            for total, part in zip(sums, found, strict=True):
                _batched(total, run).copy_(part)
        for one in ctx.tree.crossings:
            rows, keys = slice(one.begin, one.end), slice(one.trunk, one.trunk + one.start)
            parts = (grad_out[:, :, rows], *_crossed(one, query, key, value), out[:, :, rows])
            found = _flash_backward(*parts, lse[:, :, rows], is_causal=False, scaling=ctx.scaling)
            for total, part, where in zip(sums, found, (rows, keys, keys), strict=True):
                total[:, :, where] += part
        return (*(total.to(query.dtype) for total in sums), None, None)


def _batched(heads: Tensor, run: Run) -> Tensor:
    """A view: (1, H, S, D) -> (count, H, length, D)."""
    return heads[0, :, run.begin : run.end].unflatten(1, (run.count, run.length)).transpose(0, 1)


def _crossed(one: Crossing, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(one.trunk, one.trunk + one.start)
    return query[:, :, one.begin : one.end], key[:, :, keys], value[:, :, keys]


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """In place: the softmax over both sets of keys from the softmax over each."""
    merged = torch.logaddexp(lse, part_lse)
    ours, theirs = (lse - merged).exp()[..., None], (part_lse - merged).exp()[..., None]
    out.copy_(out * ours + part * theirs)
    lse.copy_(merged)


def _flash(*heads: Tensor, is_causal: bool, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Query, key, value -> out (B, H, S, D) and lse (B, H, S). Key and value may have fewer heads."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        *heads, 0.0, is_causal, scale=scaling
    )


def _flash_backward(*heads: Tensor, is_causal: bool, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of out, query, key, value, out, lse -> gradients of query, key and value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        *heads, 0.0, is_causal, scale=scaling
    )


@cache
def is_exact() -> bool:
    """Whether torch's private kernels are there and agree with stock SDPA, grouped heads and gradients included."""
    tree = TreeShape((Segment(0, 7, 0), Segment(7, 10, 0, 3), Segment(10, 12, 0, 3), Segment(12, 13, 0, 6)))
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, n, 13, 8, generator=generator).requires_grad_() for n in (4, 2, 2)]
    mask = Dense().arguments(tree, torch.device("cpu"))["attention_mask"]
    wide = [heads[0], *(each.repeat_interleave(2, dim=1) for each in heads[1:])]
    expected = functional.scaled_dot_product_attention(*wide, attn_mask=mask)
    try:
        found = _MergedAttention.apply(*heads, tree, None)  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(found.square().sum(), heads)
    except (AttributeError, RuntimeError, TypeError):
        return False
    by_hand = torch.autograd.grad(expected.square().sum(), heads)
    pairs = zip((found, *gradients), (expected, *by_hand), strict=True)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs)


AttentionInterface.register(NAME, tree_attention)
