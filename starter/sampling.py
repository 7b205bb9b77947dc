"""Batched generation and label scoring with a tiny model, in this process and seeded by one generator.

Does not use `services.engine`: an engine seeds every request separately, so the recipe would make other models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

BATCH = 128


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continuations of up to `max_tokens` without EOS: sampled at T = 1 with a generator, else greedy."""
    answers: list[list[int]] = []
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        part = [prompts[index] for index in order[start : start + BATCH]]
        answers += _generate_batch(model, part, max_tokens, eos_id, pad_id, generator)
    placed = sorted(zip(order, answers, strict=True))
    return [answer for _, answer in placed]


@torch.inference_mode()
def score_labels(
    model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], label_ids: Sequence[int], *, pad_id: int
) -> list[list[float]]:
    """For each prompt the softmax over the labels' next-token logits."""
    scores: list[list[float]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        ids, _, positions = _padded([prompts[i] for i in part], pad_id, model.device, left=False)
        last = positions.argmax(dim=1)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(part)), last])[:, list(label_ids)]
        for index, row in zip(part, logits.float().softmax(-1).tolist(), strict=True):
            scores[index] = row
    return scores


def _generate_batch(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    eos_id: int,
    pad_id: int,
    generator: torch.Generator | None,
) -> list[list[int]]:
    ids, mask, positions = _padded(prompts, pad_id, model.device, left=True)
    cache = DynamicCache(config=model.config)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    tokens: list[Tensor] = []
    for _ in range(max_tokens):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        chosen = _choose(logits, generator).masked_fill(done, eos_id)
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


def _padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (B, T); positions count from each prompt's first token and are 0 on padding."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for index, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[index, place] = torch.tensor(prompt)
        mask[index, place] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0) * mask
    return ids.to(device), mask.to(device), positions.to(device)
