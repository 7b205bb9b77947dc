"""The decode loop: rows of different length, temperature and end, continued in one batch. Called by engine.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from services.engine.base import Tokens
from services.engine.hf.model import CausalModel
from services.engine.hf.prefill import PrefilledPrompt, RowCache, pack
from shared import metrics
from shared.seeds import derive_seed


@dataclass(eq=False)
class Row:
    prompt: Tokens
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    sample: int
    is_abandoned: Callable[[], bool]
    """True once the caller has cancelled."""
    watched: Tokens = ()
    """Where one of these tokens is sampled, `watched_log_probs` gets the log-probs of all of them."""
    token_ids: list[int] = field(default_factory=list)
    watched_log_probs: dict[int, dict[int, float]] = field(default_factory=dict)
    """By place in `token_ids`, then by token: natural, of the model as it is, whatever temperature and top_p are."""
    finish_reason: Literal["length", "stop", ""] = ""

    def note(self, logits: Tensor) -> None:
        """The log-probs of the watched tokens in the next place; `logits` (V,) float32 are the model's for it."""
        found = torch.log_softmax(logits, dim=-1)[list(self.watched)].tolist()
        self.watched_log_probs[len(self.token_ids)] = dict(zip(self.watched, found, strict=True))

    def add(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        self.token_ids.append(token_id)
        if token_id in eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens or self.is_abandoned():
            self.finish_reason = "length"


@torch.inference_mode()
def generate(model: CausalModel, rows: Sequence[Row]) -> None:
    """Continue every row to its end. Each distinct prompt is prefilled once."""
    prefilled = model.prefill([row.prompt for row in rows])
    ordered = sorted(rows, key=lambda row: (-_width(row), row.prompt))
    for run in pack([_width(row) for row in ordered], max_tokens=model.max_batch_tokens):
        group = [row for row in ordered[run.start : run.stop] if not row.is_abandoned()]
        if not group:
            continue
        metrics.engine_batch_rows.set(len(group))
        _continue(model, group, prefilled)
        metrics.engine_generated_tokens_total.inc(sum(len(row.token_ids) for row in group))


def _width(row: Row) -> int:
    return len(row.prompt) + row.max_tokens


def _continue(model: CausalModel, group: Sequence[Row], prefilled: dict[Tokens, PrefilledPrompt]) -> None:
    rows = list(group)
    max_tokens = max(row.max_tokens for row in rows)
    sampling = RowSampling.of(
        [(row.temperature, row.top_p, row.seed, row.sample) for row in rows], max_tokens=max_tokens, device=model.device
    )
    logits = torch.stack([prefilled[row.prompt].logits for row in rows])
    cache = RowCache([prefilled[row.prompt] for row in rows], room=max_tokens)
    for step in range(max_tokens):
        chosen = sampling.pick(logits, step=step)
        for index, (row, token_id) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if not row.finish_reason:
                if token_id in row.watched:
                    row.note(logits[index])
                row.add(token_id, model.eos_token_ids)
        live = [index for index, row in enumerate(rows) if not row.finish_reason]
        if not live:
            return
        # Moving the cache costs about a step, so finished rows stay in the batch until half of the rows are finished.
        if len(live) <= len(rows) // 2:
            kept = torch.tensor(live, device=model.device)
            rows = [rows[index] for index in live]
            chosen, sampling = chosen[kept], sampling.select(kept)
            cache.select(kept)
        logits = model.step(chosen, cache)


@dataclass
class RowSampling:
    """How R rows sample, on the model's device.

    Unlike in `transformers.generate`, a row's randomness depends on its own seed only, not on the rest of the batch.
    Each token takes one uniform number (inverse of the cumulative distribution).
    """

    temperature: Tensor
    """(R,) float32, as `top_p`; 0 is greedy."""
    top_p: Tensor
    uniforms: Tensor
    """(R, S) float32 in [0, 1): one number for each of at most S tokens."""
    any_random: bool
    any_nucleus: bool

    @classmethod
    def of(
        cls, rows: Sequence[tuple[float, float, int, int]], *, max_tokens: int, device: torch.device
    ) -> "RowSampling":
        """From (temperature, top_p, seed, sample index) of each row."""
        drawn = [
            draw_uniforms(seed, sample, max_tokens) if temperature > 0 else np.zeros(max_tokens, np.float32)
            for temperature, _, seed, sample in rows
        ]
        return cls(
            temperature=torch.tensor([row[0] for row in rows], dtype=torch.float32, device=device),
            top_p=torch.tensor([row[1] for row in rows], dtype=torch.float32, device=device),
            uniforms=torch.from_numpy(np.stack(drawn)).to(device),
            any_random=any(temperature > 0 for temperature, *_ in rows),
            any_nucleus=any(temperature > 0 and top_p < 1 for temperature, top_p, *_ in rows),
        )

    def select(self, rows: Tensor) -> "RowSampling":
        kept = (self.temperature[rows], self.top_p[rows], self.uniforms[rows])
        return RowSampling(*kept, self.any_random, self.any_nucleus)

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
    drawn = np.random.Generator(np.random.Philox(derive_seed(seed, sample, bits=64))).random(count, dtype=np.float32)
    # Above this, rounding of the cumulative sum could select a token of probability 0.
    return np.minimum(drawn, np.float32(1 - 2**-20))


def _keep_nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the most probable tokens whose sum reaches top_p (R,); rows with top_p = 1 are unchanged."""
    ordered, _ = probs.sort(dim=-1, descending=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    last_kept = (mass_before < top_p[:, None]).sum(dim=-1, keepdim=True) - 1
    threshold = ordered.gather(-1, last_kept.clamp(min=0))
    threshold = torch.where(top_p[:, None] < 1, threshold, torch.zeros_like(threshold))
    return probs.where(probs >= threshold, torch.zeros_like(probs))


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The token at which the cumulative sum of (R, V) passes uniforms (R,) times its total."""
    cumulative = probs.cumsum(dim=-1)
    target = (uniforms * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)
