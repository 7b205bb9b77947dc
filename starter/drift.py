"""A small online-DPO loop in one process: gives the judge rollouts of a policy some steps on to learn from.

A stand-in for the real stack, kept only to make the judge's training data and to measure the judge on it.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from starter.fitting import IGNORE, Row, collate
from starter.lessons import Candidate, Group, Lessons
from starter.sampling import generate
from starter.writer import SUFFIX_TOKENS, Chunk, stream

Rewarder = Callable[[Sequence[Group]], list[list[float]]]


def roll_out(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk], *, num: int, seed: int) -> list[Group]:
    """Original, clean target and `num` rollouts for every chunk, each with the checker's verdict."""
    codec = lessons.codec
    prefixes = [lessons.prefix_ids(chunk.prefix) for chunk in chunks]
    answers = generate(
        model,
        [prefix for prefix in prefixes for _ in range(num)],
        max_tokens=SUFFIX_TOKENS,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        generator=torch.Generator().manual_seed(seed),
    )
    groups = []
    for index, (chunk, prefix) in enumerate(zip(chunks, prefixes, strict=True)):
        candidates = [
            lessons.candidate(chunk.prefix, chunk.suffix),
            lessons.candidate(chunk.prefix, chunk.target),
        ]
        texts = [codec.decode(answer) for answer in answers[index * num : (index + 1) * num]]
        before = codec.decode(prefix)
        candidates += [Candidate(codec.encode(t), lessons.checker.check(t, prefix=before)) for t in texts if t]
        groups.append(Group(prefix, candidates))
    return groups


def draw_chunks(lessons: Lessons, split: str, num: int, *, seed: int) -> list[Chunk]:
    rng = stream(lessons.world, "chunks", split, seed)
    chunks: list[Chunk] = []
    while len(chunks) < num:
        chunk = lessons.draw_chunk(rng, clean_rate=0.0)
        if chunk:
            chunks.append(chunk)
    return chunks


def drift(
    policy: LlamaForCausalLM,
    lessons: Lessons,
    reward: Rewarder,
    *,
    num_steps: int,
    seed: int,
    num_prompts: int = 8,
    num_rollouts: int = 4,
    lr: float = 4e-4,
    beta: float = 0.1,
) -> Iterator[tuple[int, LlamaForCausalLM, list[Group]]]:
    """Yields step, policy and that step's groups, the rollouts made before the step's update."""
    model = copy.deepcopy(policy)
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(num_steps):
        chunks = draw_chunks(lessons, "drift", num_prompts, seed=seed * 100_000 + step)
        groups = roll_out(model, lessons, chunks, num=num_rollouts, seed=seed * 100_000 + step)
        yield step, model, groups
        rewards = reward(groups)
        choices = [choose_pair(group, own, step) for group, own in zip(groups, rewards, strict=True)]
        pairs = [pair for pair in choices if pair]
        if pairs:
            loss = dpo_loss(model, reference, pairs, beta=beta)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def choose_pair(group: Group, rewards: Sequence[float], seed: int) -> tuple[list[int], list[int], list[int]] | None:
    """Prefix, chosen and rejected ids; ties fall at random; None without a preference."""
    noise = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed)).tolist()
    ranked = sorted(range(len(rewards)), key=lambda index: (rewards[index], noise[index]))
    if rewards[ranked[-1]] == rewards[ranked[0]]:
        return None
    return group.prefix, group.candidates[ranked[-1]].ids, group.candidates[ranked[0]].ids


def dpo_loss(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    pairs: Sequence[tuple[list[int], list[int], list[int]]],
    *,
    beta: float,
) -> Tensor:
    rows = [_suffix_row(prefix, chosen) for prefix, chosen, _ in pairs]
    rows += [_suffix_row(prefix, rejected) for prefix, _, rejected in pairs]
    with torch.no_grad():
        before = _log_prob(reference, rows)
    margin = (_log_prob(model, rows) - before).view(2, -1)
    return -F.logsigmoid(beta * (margin[0] - margin[1])).mean()


def _suffix_row(prefix: list[int], suffix: list[int]) -> Row:
    return Row([*prefix, *suffix], {len(prefix) - 1 + place: token for place, token in enumerate(suffix)})


def _log_prob(model: LlamaForCausalLM, rows: Sequence[Row]) -> Tensor:
    """Summed log-probability of each row's labels, (B,)."""
    ids, labels, _ = collate(rows, str(model.device))
    logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return -losses.sum(dim=1)


def save_groups(groups: Sequence[Group], file: Path) -> None:
    lines = [json.dumps({"prefix": g.prefix, "candidates": [c.ids for c in g.candidates]}) for g in groups]
    written = file.with_suffix(".tmp")
    written.write_text("\n".join(lines) + "\n", encoding="utf-8")
    written.rename(file)


def load_groups(lessons: Lessons, file: Path) -> list[Group]:
    """Groups as saved; their verdicts are taken anew."""
    groups = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        before = lessons.codec.decode(record["prefix"])
        texts = [(ids, lessons.codec.decode(ids)) for ids in record["candidates"]]
        candidates = [Candidate(ids, lessons.checker.check(text, prefix=before)) for ids, text in texts]
        groups.append(Group(record["prefix"], candidates))
    return groups
