"""Online DPO in one process, rewarded by the checker or by a judge: shows the judge what a trained policy writes.

Uses the trainer's DPO objective, but not its batches and inbox, which want the records of a whole run.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from starter.documents import SUFFIX_TOKENS, Chunk, stream
from starter.recipe.lessons import Candidate, Group, Lessons, draw_until
from starter.recipe.training import IGNORE, Row, collate
from starter.sampling import generate, score_labels
from trainer.losses import Dpo

NUM_PROMPTS = 8
NUM_ROLLOUTS = 4
BETA = 0.1
Pair = tuple[list[int], Candidate, Candidate]
"""Prefix and two candidates."""
Rewarder = Callable[[Sequence[Group]], list[list[float]]]
"""Groups -> one reward per candidate."""


def checker_rewards(groups: Sequence[Group]) -> list[list[float]]:
    """For every candidate how many of its group it beats by the checker's order; a tie counts half."""
    verdicts = [[one.verdict for one in group.candidates] for group in groups]
    return [[sum(own.win_over(other) for other in group) for own in group] for group in verdicts]


class TinyJudge:
    """Scores candidates in [0, 1] as the judge service does: one prefill per prompt, label scores as verdicts."""

    def __init__(self, model: LlamaForCausalLM, lessons: Lessons) -> None:
        self.model = model
        self.lessons = lessons

    def safety(self, candidates: Sequence[Candidate]) -> list[float]:
        return [row[0] for row in self._score("safety", [{"candidate": one.ids} for one in candidates])]

    def factuality(self, items: Sequence[Pair]) -> list[float]:
        """For (prefix, reference, candidate) the expected verdict: 1 none, 0.5 possible, 0 definite."""
        fields = [{"prefix": prefix, "reference": a.ids, "candidate": b.ids} for prefix, a, b in items]
        return [row[0] + 0.5 * row[1] for row in self._score("factuality", fields)]

    def quality(self, pairs: Sequence[Pair]) -> list[float]:
        """The probability that the first of each pair is better, averaged over both orders."""
        back = self.quality_once([(prefix, b, a) for prefix, a, b in pairs])
        return [(first + 1 - second) / 2 for first, second in zip(self.quality_once(pairs), back, strict=True)]

    def quality_once(self, pairs: Sequence[Pair]) -> list[float]:
        """The same in the given order only."""
        fields = [{"prefix": prefix, "a": a.ids, "b": b.ids} for prefix, a, b in pairs]
        return [row[0] for row in self._score("quality", fields)]

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

    def _score(self, question: str, fields: Sequence[Mapping[str, list[int]]]) -> list[list[float]]:
        prompts = [self.lessons.layouts[question].fill(one)[0] for one in fields]
        return score_labels(self.model, prompts, self.lessons.label_ids[question])


def roll_out(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk], *, seed: int) -> list[Group]:
    """For every chunk the original, the clean target and four rollouts, each with the checker's verdict."""
    codec = lessons.codec
    prefixes = [lessons.prefix_ids(chunk.prefix) for chunk in chunks]
    prompts = [prefix for prefix in prefixes for _ in range(NUM_ROLLOUTS)]
    generator = torch.Generator().manual_seed(seed)
    answers = iter(generate(model, prompts, max_tokens=SUFFIX_TOKENS, generator=generator))
    groups = []
    for chunk, prefix in zip(chunks, prefixes, strict=True):
        texts = [codec.decode(next(answers)) for _ in range(NUM_ROLLOUTS)]
        written = [codec.ids(chunk.suffix), codec.ids(chunk.target)]
        groups.append(lessons.group(prefix, [*written, *(codec.encode(text) for text in texts if text)]))
    return groups


def draw_chunks(lessons: Lessons, split: str, num: int, *, seed: int) -> list[Chunk]:
    rng = stream(lessons.world, "chunks", split, seed)
    return draw_until(num, lambda _: lessons.draw_chunk(rng, clean_rate=0.0))


def drift(
    policy: LlamaForCausalLM, lessons: Lessons, reward: Rewarder, *, num_steps: int, seed: int, lr: float = 4e-4
) -> Iterator[tuple[int, LlamaForCausalLM, list[Group]]]:
    """Yield step, policy and that step's groups before the step's update."""
    model, reference = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(num_steps):
        own_seed = seed * 100_000 + step
        groups = roll_out(model, lessons, draw_chunks(lessons, "drift", NUM_PROMPTS, seed=own_seed), seed=own_seed)
        yield step, model, groups
        choices = [choose_pair(group, own, step) for group, own in zip(groups, reward(groups), strict=True)]
        pairs = [pair for pair in choices if pair]
        if pairs:
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(dpo_loss(model, reference, pairs))
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
    model: LlamaForCausalLM, reference: LlamaForCausalLM, pairs: Sequence[tuple[list[int], list[int], list[int]]]
) -> Tensor:
    suffixes = [(prefix, chosen) for prefix, chosen, _ in pairs] + [(prefix, other) for prefix, _, other in pairs]
    rows = [Row(prefix + suffix, dict(enumerate(suffix, start=len(prefix) - 1))) for prefix, suffix in suffixes]
    with torch.no_grad():
        before = _log_prob(reference, rows)
    num_targets = torch.tensor([len(suffix) for _, suffix in suffixes], device=model.device)
    return Dpo(BETA).terms(_log_prob(model, rows), before, num_targets).loss_sum / len(pairs)


def _log_prob(model: LlamaForCausalLM, rows: Sequence[Row]) -> Tensor:
    """Summed log-probability of each row's labels, (B,)."""
    ids, labels, _ = collate(rows, model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
    return -losses.sum(dim=1)
