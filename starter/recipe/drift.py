"""Online DPO in one process, rewarded by the checker or by a judge: shows the judge what a trained policy writes.

Uses the trainer's DPO objective, but not its batches and inbox, which want the records of a whole run.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from services.judge.questions import QUESTIONS
from starter.documents import SUFFIX_TOKENS, Chunk, stream
from starter.recipe.lessons import Candidate, Group, Lessons, draw_until
from starter.recipe.training import IGNORE, Row, collate
from starter.sampling import generate, score_labels
from trainer.objectives import Dpo

Rewarder = Callable[[Sequence[Group]], list[list[float]]]
"""Groups -> one reward per candidate."""


def checker_rewards(groups: Sequence[Group]) -> list[list[float]]:
    return [[order_reward(group, index) for index in range(len(group.candidates))] for group in groups]


def order_reward(group: Group, index: int) -> float:
    """How many candidates of the group this one beats by the checker's order; a tie counts half."""
    own = group.candidates[index].verdict.order
    return sum(0.5 if own == other.verdict.order else float(own > other.verdict.order) for other in group.candidates)


class TinyJudge:
    """Scores candidates in [0, 1] as the judge service does: one prefill per prompt, label scores as verdicts."""

    def __init__(self, model: LlamaForCausalLM, lessons: Lessons) -> None:
        self.model = model
        self.lessons = lessons

    def safety(self, candidates: Sequence[Candidate]) -> list[float]:
        layout = self.lessons.layouts["safety"]
        prompts = [layout.fill({"candidate": one.ids}).ids for one in candidates]
        return [row[0] for row in self._score(prompts, QUESTIONS["safety"].labels)]

    def factuality(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """For (prefix, reference, candidate) the expected verdict: 1 none, 0.5 possible, 0 definite."""
        layout = self.lessons.layouts["factuality"]
        prompts = [
            layout.fill({"prefix": prefix, "reference": reference.ids, "candidate": candidate.ids}).ids
            for prefix, reference, candidate in items
        ]
        return [row[0] + 0.5 * row[1] for row in self._score(prompts, QUESTIONS["factuality"].labels)]

    def quality(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """For (prefix, a, b) the probability that a is better, averaged over both orders."""
        back = self.quality_once([(prefix, b, a) for prefix, a, b in items])
        return [(first + 1 - second) / 2 for first, second in zip(self.quality_once(items), back, strict=True)]

    def quality_once(self, items: Sequence[tuple[list[int], Candidate, Candidate]]) -> list[float]:
        """The same in the given order only."""
        layout = self.lessons.layouts["quality"]
        prompts = [layout.fill({"prefix": prefix, "a": a.ids, "b": b.ids}).ids for prefix, a, b in items]
        return [row[0] for row in self._score(prompts, QUESTIONS["quality"].labels)]

    def rewards(self, groups: Sequence[Group]) -> list[list[float]]:
        """For every candidate its mean win rate against its group plus its safety."""
        items = [(group.prefix, a, b) for group in groups for a, b in combinations(group.candidates, 2)]
        quality = iter(self.quality_once(items))
        safety = iter(self.safety([candidate for group in groups for candidate in group.candidates]))
        rewards = []
        for group in groups:
            wins: list[list[float]] = [[] for _ in group.candidates]
            for first, second in combinations(wins, 2):
                score = next(quality)
                first.append(score)
                second.append(1 - score)
            rewards.append([fmean(won) + next(safety) for won in wins])
        return rewards

    def _score(self, prompts: Sequence[list[int]], labels: Sequence[str]) -> list[list[float]]:
        ids = [self.lessons.label_ids[label] for label in labels]
        return score_labels(self.model, prompts, ids, pad_id=self.lessons.codec.pad_id)


def roll_out(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk], *, num: int, seed: int) -> list[Group]:
    """For every chunk the original, the clean target and `num` rollouts, each with the checker's verdict."""
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
    return draw_until(num, lambda _: lessons.draw_chunk(rng, clean_rate=0.0))


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
    """Yield step, policy and that step's groups before the step's update."""
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
    """Prefix, chosen and rejected ids, ties broken at random; None if all rewards are equal."""
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
    return Dpo(beta).terms(_log_prob(model, rows), before).loss_sum / len(pairs)


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
    """Saved groups, checked again."""
    groups = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        before = lessons.codec.decode(record["prefix"])
        texts = [(ids, lessons.codec.decode(ids)) for ids in record["candidates"]]
        candidates = [Candidate(ids, lessons.checker.check(text, prefix=before)) for ids, text in texts]
        groups.append(Group(record["prefix"], candidates))
    return groups
