"""How likely a policy's continuations of held-out prefixes are under a teacher.

The measure is the same as judge `likelihood`: log-prob per token under the teacher given the prefix, averaged per
continuation, then over continuations. Distinct-4 goes with it, because repetition raises likelihood.
Called by benchmarks/real_text.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_BATCH_ROWS = 32


@dataclass(frozen=True)
class LikelihoodResult:
    mean_log_prob: float
    """Natural log per token, mean over continuations."""
    half_width: float
    """Half of the 95 % interval of that mean, over prefixes."""
    distinct_4: float
    """Share of distinct token 4-grams per continuation, mean over continuations; 1 means no repetition."""
    num_prefixes: int


def held_out_prefixes(
    documents: Path, tokenizer_folder: Path, *, num_prefixes: int, prefix_tokens: int
) -> list[list[int]]:
    """`num_prefixes` blocks of `prefix_tokens` tokens, spread evenly over the texts of a JSONL file."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    blocks: list[list[int]] = []
    for line in documents.read_text(encoding="utf-8").splitlines():
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)
        blocks += [ids[i : i + prefix_tokens] for i in range(0, len(ids) - prefix_tokens + 1, prefix_tokens * 2)]
    if len(blocks) < num_prefixes:
        raise ValueError(
            f"{documents} has {len(blocks)} prefixes of {prefix_tokens} tokens, not {num_prefixes}; add documents"
        )
    stride = len(blocks) // num_prefixes
    return blocks[::stride][:num_prefixes]


def teacher_log_prob(
    policy_folder: Path, teacher_folder: Path, prefixes: Sequence[Sequence[int]], *, new_tokens: int, seed: int
) -> LikelihoodResult:
    """Sample one continuation of `new_tokens` tokens per prefix at T = 1 and score it under the teacher."""
    continuations = sample(policy_folder, prefixes, new_tokens=new_tokens, seed=seed)
    teacher: Any = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    teacher.eval()
    batches = zip(
        torch.split(torch.tensor(prefixes), _BATCH_ROWS), torch.split(continuations, _BATCH_ROWS), strict=True
    )
    means = torch.cat([_mean_log_probs(teacher, *batch) for batch in batches])
    return LikelihoodResult(
        mean_log_prob=means.mean().item(),
        half_width=1.96 * means.std().item() / len(prefixes) ** 0.5,
        distinct_4=sum(_distinct_4(row) for row in continuations.tolist()) / len(prefixes),
        num_prefixes=len(prefixes),
    )


def sample(policy_folder: Path, prefixes: Sequence[Sequence[int]], *, new_tokens: int, seed: int) -> torch.Tensor:
    """(prefixes, new_tokens): one continuation per prefix at T = 1, EOS forbidden. Prefixes must be equally long."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=torch.float32)
    policy.eval()
    torch.manual_seed(seed)
    rows = []
    for batch in torch.split(torch.tensor(prefixes), _BATCH_ROWS):
        answer = policy.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=policy.config.eos_token_id or 0,
        )
        rows.append(answer[:, batch.shape[1] :])
    return torch.cat(rows)


@torch.inference_mode()
def _mean_log_probs(teacher: Any, prefixes: torch.Tensor, continuations: torch.Tensor) -> torch.Tensor:
    """Mean log-prob per token of continuations (B, S) after prefixes (B, P): (B,)."""
    ids = torch.cat([prefixes, continuations], dim=1)
    logits = teacher(input_ids=ids).logits[:, prefixes.shape[1] - 1 : -1].float()  # (B, S, V)
    log_probs: torch.Tensor = logits.log_softmax(-1).gather(-1, continuations.unsqueeze(-1)).squeeze(-1)
    return log_probs.mean(dim=1)


def _distinct_4(token_ids: Sequence[int]) -> float:
    grams = [tuple(token_ids[i : i + 4]) for i in range(len(token_ids) - 3)]
    return len(set(grams)) / len(grams) if grams else 1.0
