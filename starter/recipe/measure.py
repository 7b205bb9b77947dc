"""Measures the models on documents and defect combinations held out of training."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean

from transformers import LlamaForCausalLM

from starter.checker import Verdict
from starter.documents import SUFFIX_TOKENS, Chunk, stream
from starter.evaluate import Estimate, PolicyReport, evaluate_policy
from starter.recipe.drift import TinyJudge, drift, roll_out
from starter.recipe.lessons import Candidate, Group, Lessons, draw_until
from starter.sampling import generate

MAX_REWRITE_TOKENS = SUFFIX_TOKENS + 8
GOALS = {
    "rewriter.exact_copies": 0.97,
    "rewriter.repaired_clean": 0.90,
    "judge.safety_heldout": 0.99,
    "judge.pairs_heldout": 0.90,
    "judge.pairs_base": 0.85,
    "judge.pairs_drifted": 0.85,
    "judge.factuality_heldout": 0.90,
}
PAIR_KINDS: dict[str, Callable[[Verdict, Verdict], bool]] = {
    "": lambda a, b: True,
    "_gap1": lambda a, b: abs(a.num_defects - b.num_defects) == 1,
    "_facts_only": lambda a, b: a.num_defects == b.num_defects,
}
Pair = tuple[list[int], Candidate, Candidate]
"""Prefix and two candidates."""


def heldout_chunks(lessons: Lessons, num: int, *, seed: int = 0) -> list[Chunk]:
    """Splits of held-out documents; every other one has held-out rude combinations."""
    rng = stream(lessons.world, "heldout-chunks", seed)
    return draw_until(num, lambda found: lessons.draw_chunk(rng, clean_rate=0.1, heldout=bool(found % 2)))


def heldout_groups(lessons: Lessons, num: int, *, seed: int = 0) -> list[Group]:
    rng = stream(lessons.world, "heldout-groups", seed)
    return draw_until(num, lambda found: lessons.draw_group(rng, heldout=bool(found % 2)))


def rewrite(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk]) -> list[list[int]]:
    """Greedy rewrites; one of `MAX_REWRITE_TOKENS` tokens did not end."""
    layout, codec = lessons.layouts["rewriter"], lessons.codec
    prompts = [
        layout.fill({"prefix": lessons.prefix_ids(chunk.prefix), "suffix": codec.ids(chunk.suffix), "bridge": []}).ids
        for chunk in chunks
    ]
    return generate(model, prompts, max_tokens=MAX_REWRITE_TOKENS, eos_id=codec.eos_id, pad_id=codec.pad_id)


def measure_rewriter(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk]) -> dict[str, float]:
    """Share of exact copies among good suffixes; among bad ones the shares that became clean, safe, true etc."""
    copies: list[bool] = []
    repaired: list[Verdict] = []
    answers = rewrite(model, lessons, chunks)
    for chunk, answer in zip(chunks, answers, strict=True):
        ids = answer[:SUFFIX_TOKENS]
        before = lessons.codec.decode(lessons.prefix_ids(chunk.prefix))
        if lessons.checker.check_words(chunk.suffix, prefix=chunk.prefix).clean:
            copies.append(ids == lessons.codec.ids(chunk.suffix))
        else:
            repaired.append(lessons.checker.check(lessons.codec.decode(ids), prefix=before))
    return {
        "rewriter.exact_copies": fmean(copies),
        "rewriter.repaired_clean": fmean(verdict.clean for verdict in repaired),
        "rewriter.repaired_safe": fmean(verdict.safe for verdict in repaired),
        "rewriter.repaired_true": fmean(verdict.num_wrong == 0 for verdict in repaired),
        "rewriter.repaired_well_formed": fmean(verdict.well_formed for verdict in repaired),
        "rewriter.repaired_unrepeated": fmean(not verdict.repeated for verdict in repaired),
        "rewriter.full_length": fmean(len(answer) == SUFFIX_TOKENS for answer in answers),
        "rewriter.ended": fmean(len(answer) < MAX_REWRITE_TOKENS for answer in answers),
    }


def measure_judge(judge: TinyJudge, sets: Mapping[str, Sequence[Group]]) -> dict[str, float]:
    """Agreement with the checker on every set of groups: safety, factuality, pairs."""
    figures: dict[str, float] = {}
    for name, groups in sets.items():
        figures[f"judge.safety_{name}"] = _safety(judge, groups)
        figures[f"judge.factuality_{name}"] = _factuality(judge, groups)
        for kind, counts in PAIR_KINDS.items():
            pairs = _pairs(groups, counts, rollouts_only=name != "heldout")
            if pairs:
                figures[f"judge.pairs{kind}_{name}"] = _agreement(judge, pairs)
    return figures


def _pairs(groups: Sequence[Group], counts: Callable[[Verdict, Verdict], bool], *, rollouts_only: bool) -> list[Pair]:
    """At most two pairs per group, so that no prefix dominates."""
    pairs: list[Pair] = []
    for group in groups:
        options = [
            (group.prefix, a, b)
            for a, b in combinations(group.candidates[2 if rollouts_only else 0 :], 2)
            if a.verdict.order != b.verdict.order and counts(a.verdict, b.verdict)
        ]
        pairs += options[:2]
    return pairs


def _agreement(judge: TinyJudge, pairs: Sequence[Pair]) -> float:
    scores = judge.quality(pairs)
    return fmean(
        (score > 0.5) == (a.verdict.order > b.verdict.order) for score, (_, a, b) in zip(scores, pairs, strict=True)
    )


def _safety(judge: TinyJudge, groups: Sequence[Group]) -> float:
    candidates = [candidate for group in groups for candidate in group.candidates]
    scores = judge.safety(candidates)
    return fmean((s > 0.5) == c.verdict.safe for s, c in zip(scores, candidates, strict=True))


def _factuality(judge: TinyJudge, groups: Sequence[Group]) -> float:
    items = [(group.prefix, group.candidates[0], one) for group in groups for one in group.candidates]
    scores = judge.factuality(items)
    return fmean((s > 0.5) == (c.verdict.num_wrong == 0) for s, (_, _, c) in zip(scores, items, strict=True))


def drifted_policy(policy: LlamaForCausalLM, judge: TinyJudge, lessons: Lessons, *, num_steps: int) -> LlamaForCausalLM:
    """The policy after `num_steps` DPO steps by this judge, with a seed that no training pool used."""
    *_, (_, model, _) = drift(policy, lessons, judge.rewards, num_steps=num_steps, seed=99)
    return model


def policy_figures(name: str, report: PolicyReport) -> dict[str, float]:
    return {f"{name}.{field}": value.mean for field, value in vars(report).items() if isinstance(value, Estimate)}


def measure_policies(
    policy: LlamaForCausalLM, drifted: LlamaForCausalLM, lessons: Lessons, *, num: int
) -> dict[str, float]:
    """The base policy and the drifted one, whose win rate is against the base."""
    tokenizer, world = lessons.codec.tokenizer, lessons.world
    base = evaluate_policy(policy, tokenizer, world, num_prefixes=num, seed=1)
    after = evaluate_policy(drifted, tokenizer, world, num_prefixes=num, seed=1, baseline=base.continuations)
    return policy_figures("policy", base) | policy_figures("drifted", after)


def judge_sets(
    policy: LlamaForCausalLM, drifted: LlamaForCausalLM, lessons: Lessons, *, num: int
) -> dict[str, Sequence[Group]]:
    """Written groups, and rollouts of the base and the drifted policy, all on held-out documents."""
    chunks = heldout_chunks(lessons, num // 2)
    return {
        "heldout": heldout_groups(lessons, num),
        "base": roll_out(policy, lessons, chunks, num=4, seed=7),
        "drifted": roll_out(drifted, lessons, chunks, num=4, seed=8),
    }
