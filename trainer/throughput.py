"""What a step computed and how fast: tokens, pairs and windows a second, tokens that the tree saved, MFU, memory.

    work = Work()
    for ...: work.add(one_pass)                                     # on every rank, passes that count only
    throughput.figures(ranks.sum(work.tensor()), pairs, computing_s=...)     # on rank 0, once a step

MFU is the arithmetic of the model over what the GPUs could have done in the seconds of forward, backward and optimizer:
waiting is not in it (see `seconds_wait_*`), nor is what activation checkpointing computes twice. Padding counts.
"""

import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.layouts.base import Pass
from trainer.log_probs import output_head
from trainer.preferences import Preference

# Dense bf16 TFLOP/s with fp32 accumulation: NVIDIA's data sheets (half of the figure where they give only the one "with
# sparsity"); for GeForce the white papers "Ada GPU Architecture", "Ampere GA102" and "RTX Blackwell".
_PEAK_TFLOPS = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bH200 NVL\b", 835.5),
    (r"\bG?H200\b", 989.4),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100\b", 989.4),
    (r"\bA100\b", 312.0),
    (r"\bA40\b", 149.7),
    (r"\bA30\b", 165.0),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 5090$", 209.5),
    (r"\bRTX 4090$", 165.2),
    (r"\bRTX 3090$", 71.0),
)
_COUNTS = ("tokens", "separate_tokens", "targets", "score_pairs")


class Work:
    """What the passes of a step compute on one rank. Nothing waits for the device before `tensor`."""

    def __init__(self) -> None:
        self._counts: dict[str, int | Tensor] = dict.fromkeys(_COUNTS, 0)

    def add(self, one: Pass) -> None:
        found = (one.num_tokens, one.num_separate_tokens, one.targets.numel(), _score_pairs(one))
        for name, count in zip(_COUNTS, found, strict=True):
            self._counts[name] = self._counts[name] + count

    def tensor(self) -> Tensor:
        """(4,) fp64 on the CPU, may be summed over ranks: tokens through the policy, tokens of separate sequences,
        suffix tokens, and (query, key) pairs of attention."""
        return torch.tensor([float(self._counts[name]) for name in _COUNTS], dtype=torch.float64)


def _score_pairs(one: Pass) -> int | Tensor:
    """A token sees itself and everything before it in its own sequence, wherever the layout put that."""
    if one.position_ids is None:
        length = one.input_ids.shape[1]
        return one.input_ids.shape[0] * length * (length + 1) // 2
    return one.position_ids.sum() + one.num_tokens


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one forward pass."""

    per_token: float
    """Two for each weight that every token is multiplied by: neither embeddings nor head."""
    per_target: float
    """The head: suffix tokens only."""
    per_score_pair: float
    """Of all layers: query times key, and weight times value."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelFlops | None":
        """None for a mixture of experts, where a token meets only some of the weights."""
        config = model.config.get_text_config()
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            return None
        num_weights = sum(
            parameter.numel()
            for module in model.base_model.modules()
            if not isinstance(module, nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.ndim > 1
        )
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        scores = 4 * config.num_hidden_layers * config.num_attention_heads * width
        num_head_weights = next(output_head(model).parameters()).numel()
        return cls(per_token=2 * num_weights, per_target=2 * num_head_weights, per_score_pair=scores)

    def forward(self, tokens: float, targets: float, score_pairs: float) -> float:
        return self.per_token * tokens + self.per_target * targets + self.per_score_pair * score_pairs


def peak_flops(device_name: str) -> float | None:
    """A second, of the GPU that `torch.cuda.get_device_name` calls so; None if it isn't known, or is a slice of one."""
    if "MIG" in device_name:
        return None
    return next((1e12 * value for pattern, value in _PEAK_TFLOPS if re.search(pattern, device_name)), None)


@dataclass
class Throughput:
    """Held by rank 0."""

    flops: ModelFlops | None
    peak_flops: float | None
    """A second, of all ranks together."""
    forwards: int
    """A backward pass computes as much as two forward passes: 3 in all, 4 with a reference."""
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._since = self.clock()

    @classmethod
    def of(cls, model: PreTrainedModel, *, with_reference: bool, num_ranks: int = 1) -> "Throughput":
        peak = peak_flops(torch.cuda.get_device_name(model.device)) if model.device.type == "cuda" else None
        forwards = 4 if with_reference else 3
        return cls(ModelFlops.of(model), peak and peak * num_ranks, forwards, model.device)

    def figures(self, work: Tensor, pairs: Sequence[Preference], *, computing_s: float) -> dict[str, float]:
        """Of one step, with rates over all seconds since the call before. `work` as of `Work.tensor`, `pairs` of all
        ranks, `computing_s` the seconds of forward, backward and optimizer."""
        now = self.clock()
        seconds, self._since = now - self._since, now
        tokens, separate_tokens, targets, score_pairs = work.tolist()
        figures = {
            "batch_tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": len(pairs) / seconds,
            "windows_per_second": len({pair.window_id for pair in pairs}) / seconds,
            "saved_token_share": 1 - tokens / separate_tokens,
            "peak_memory_bytes": _peak_memory_bytes(self.device),
        }
        if self.flops and self.peak_flops:
            spent = self.forwards * self.flops.forward(tokens, targets, score_pairs)
            figures["mfu"] = spent / computing_s / self.peak_flops
        return figures


def _peak_memory_bytes(device: torch.device) -> float:
    """Since the process began: allocated on its GPU; on a CPU the resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in kibibytes
