"""Picks next tokens, each row by its own temperature, top-p and randomness. Called once a step by decoding.py.

Differences from `transformers.generate`: a row's randomness depends on its own seed alone, not on the rows beside
it, and one uniform number per token (inverse of the cumulative distribution) is all that is drawn.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class RowSampling:
    """Sampling of R rows, on the model's device."""

    temperature: Tensor
    """(R,) float32; 0 is greedy."""
    top_p: Tensor
    """(R,) float32."""
    uniforms: Tensor
    """(R, S) float32 in [0, 1): the number for each of at most S tokens."""
    any_random: bool
    any_nucleus: bool

    @classmethod
    def of(
        cls, rows: Sequence[tuple[float, float, int, int]], *, max_tokens: int, device: torch.device
    ) -> "RowSampling":
        """From (temperature, top_p, seed, sample index) of each row."""
        any_random = any(temperature > 0 for temperature, *_ in rows)
        drawn = [
            draw_uniforms(seed, sample, max_tokens) if temperature > 0 else np.zeros(max_tokens, np.float32)
            for temperature, _, seed, sample in rows
        ]
        return cls(
            temperature=torch.tensor([row[0] for row in rows], dtype=torch.float32, device=device),
            top_p=torch.tensor([row[1] for row in rows], dtype=torch.float32, device=device),
            uniforms=torch.from_numpy(np.stack(drawn)).to(device),
            any_random=any_random,
            any_nucleus=any(temperature > 0 and top_p < 1 for temperature, top_p, *_ in rows),
        )

    def select(self, rows: Tensor) -> "RowSampling":
        return RowSampling(
            self.temperature[rows], self.top_p[rows], self.uniforms[rows], self.any_random, self.any_nucleus
        )

    def pick(self, logits: Tensor, *, step: int) -> Tensor:
        """Token ids (R,) for logits (R, V) float32."""
        greedy = logits.argmax(dim=-1)
        if not self.any_random:
            return greedy
        probs = torch.softmax(logits / self.temperature.clamp(min=1e-6)[:, None], dim=-1)
        if self.any_nucleus:
            probs = _keep_nucleus(probs, self.top_p)
        sampled = _invert(probs, self.uniforms[:, step])
        return torch.where(self.temperature > 0, sampled, greedy)


def draw_uniforms(seed: int, sample: int, count: int) -> np.ndarray:
    """`count` float32 numbers in [0, 1 - 2^-20]; a longer draw begins with the shorter one."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}.{sample}".encode(), digest_size=8).digest(), "little")
    drawn = np.random.Generator(np.random.Philox(key)).random(count, dtype=np.float32)
    # Above this, rounding of the cumulative sum could point behind the last token with any probability.
    return np.minimum(drawn, np.float32(1 - 2**-20))


def _keep_nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the most probable tokens whose sum reaches top_p (R,); rows with top_p = 1 stay as they are."""
    ordered, _ = probs.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    last_kept = (mass_before < top_p[:, None]).sum(dim=-1, keepdim=True) - 1
    threshold = ordered.gather(-1, last_kept.clamp(min=0))
    threshold = torch.where(top_p[:, None] < 1, threshold, torch.zeros_like(threshold))
    return probs.where(probs >= threshold, torch.zeros_like(probs))


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token where the cumulative sum of (R, V) passes uniforms (R,) times its total."""
    cumulative = probs.cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
