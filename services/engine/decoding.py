"""The decode loop: rows of any length, temperature and end, continued together. Called by worker.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from services.engine.model import CausalModel
from services.engine.rows import PrefilledPrompt, RowCache
from services.engine.sampling import RowSampling
from services.engine.trunks import Tokens, pack
from shared import metrics


@dataclass(eq=False)
class Row:
    """One sample of one prompt on its way."""

    prompt: Tokens
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    sample: int
    is_abandoned: Callable[[], bool]
    """True once its caller is gone."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["length", "stop", ""] = ""

    def add(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        self.token_ids.append(token_id)
        if token_id in eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_tokens or self.is_abandoned():
            self.finish_reason = "length"


@torch.inference_mode()
def generate(model: CausalModel, rows: Sequence[Row]) -> None:
    """Continue every row to its end. Each distinct prompt is prefilled once, however many groups its rows fall in."""
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
        [(row.temperature, row.top_p, row.seed, row.sample) for row in rows],
        max_tokens=max_tokens,
        device=model.device,
    )
    logits = torch.stack([prefilled[row.prompt].logits for row in rows])
    cache = RowCache([prefilled[row.prompt] for row in rows], room=max_tokens)
    for step in range(max_tokens):
        chosen = sampling.pick(logits, step=step)
        for row, token_id in zip(rows, chosen.tolist(), strict=True):
            if not row.finish_reason:
                row.add(token_id, model.eos_token_ids)
        live = [index for index, row in enumerate(rows) if not row.finish_reason]
        if not live:
            return
        # Rows that have ended are computed along until half of them have: moving the cache costs about a step.
        if len(live) <= len(rows) // 2:
            kept = torch.tensor(live, device=model.device)
            rows = [rows[index] for index in live]
            chosen, sampling = chosen[kept], sampling.select(kept)
            cache.select(kept)
        logits = model.step(chosen, cache)
