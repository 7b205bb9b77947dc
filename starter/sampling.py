"""Batched generation and label scoring with a tiny model, in this process and seeded by one generator.

Does not use `services.engine`: an engine seeds every request separately, so the recipe would make other models.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

BATCH = 128
Prompts = Sequence[Sequence[int]]


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM, prompts: Prompts, *, max_tokens: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Continuations of up to `max_tokens` without EOS: sampled at T = 1 with a generator, else greedy."""
    answers: list[list[int]] = [[] for _ in prompts]
    for part in _batches(prompts):
        rows = _generate_batch(model, [prompts[index] for index in part], max_tokens, generator)
        for index, row in zip(part, rows, strict=True):
            answers[index] = row
    return answers


@torch.inference_mode()
def score_labels(model: LlamaForCausalLM, prompts: Prompts, label_ids: Sequence[int]) -> list[list[float]]:
    """For each prompt the softmax over the labels' next-token logits."""
    scores: list[list[float]] = [[] for _ in prompts]
    for part in _batches(prompts):
        ids, _, positions = _padded(model, [prompts[index] for index in part], left=False)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(part)), positions.argmax(dim=1)])[:, list(label_ids)]
        for index, row in zip(part, logits.float().softmax(-1).tolist(), strict=True):
            scores[index] = row
    return scores


def _batches(prompts: Prompts) -> Iterator[list[int]]:
    """Indices of prompts of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return (order[start : start + BATCH] for start in range(0, len(order), BATCH))


def _generate_batch(
    model: LlamaForCausalLM, prompts: Prompts, max_tokens: int, generator: torch.Generator | None
) -> list[list[int]]:
    eos_id = int(model.config.eos_token_id)  # type: ignore[arg-type]
    ids, mask, positions = _padded(model, prompts, left=True)
    cache = DynamicCache(config=model.config)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    tokens: list[Tensor] = []
    for _ in range(max_tokens):
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
        chosen = _choose(out.logits[:, -1].float(), generator).masked_fill(done, eos_id)
        done |= chosen == eos_id
        tokens.append(chosen)
        if bool(done.all()):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    rows: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def _choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits, device="cpu").exponential_(generator=generator).to(logits.device)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


def _padded(model: LlamaForCausalLM, prompts: Prompts, *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (B, T); positions count from each prompt's first token and are 0 on padding."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), model.config.pad_token_id)  # type: ignore[arg-type]
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[index, place] = torch.tensor(prompt)
        mask[index, place] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) * mask
    return ids.to(model.device), mask.to(model.device), positions.to(model.device)
