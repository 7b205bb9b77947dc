"""Measures the models on documents and defect combinations held out of training."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from statistics import fmean

from transformers import LlamaForCausalLM

from starter.checker import Verdict
from starter.documents import SUFFIX_TOKENS, Chunk, stream
from starter.evaluate import Estimate, evaluate_policy
from starter.grammar import join_words
from starter.recipe.drift import Pair, TinyJudge, drift, roll_out
from starter.recipe.lessons import Group, Lessons, draw_until
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


def heldout_chunks(lessons: Lessons, num: int, *, seed: int = 0) -> list[Chunk]:
    """Splits of held-out documents; every other one has held-out rude combinations."""
    rng = stream(lessons.world, "heldout-chunks", seed)
    return draw_until(num, lambda found: lessons.draw_chunk(rng, clean_rate=0.1, heldout=bool(found % 2)))


def heldout_groups(lessons: Lessons, num: int, *, seed: int = 0) -> list[Group]:
    rng = stream(lessons.world, "heldout-groups", seed)
    return draw_until(num, lambda found: lessons.draw_group(rng, heldout=bool(found % 2)))


def measure_rewriter(model: LlamaForCausalLM, lessons: Lessons, chunks: Sequence[Chunk]) -> dict[str, float]:
    """Share of exact copies among good suffixes; among bad ones the shares that became clean, safe, true etc.

    Decodes greedily; an answer of `MAX_REWRITE_TOKENS` tokens did not end.
    """
    codec, checker = lessons.codec, lessons.checker
    prompts = [lessons.rewriter_prompt(chunk)[0] for chunk in chunks]
    answers = generate(model, prompts, max_tokens=MAX_REWRITE_TOKENS)
    copies: list[bool] = []
    repaired: list[Verdict] = []
    for chunk, answer in zip(chunks, answers, strict=True):
        ids = answer[:SUFFIX_TOKENS]
        if checker.check_words(chunk.suffix, prefix=chunk.prefix).clean:
            copies.append(ids == codec.ids(chunk.suffix))
        else:
            repaired.append(checker.check(codec.decode(ids), prefix=join_words(chunk.prefix)))
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
        items = [(group.prefix, group.candidates[0], one) for group in groups for one in group.candidates]
        verdicts = [one.verdict for _, _, one in items]
        safety, factuality = judge.safety([one for _, _, one in items]), judge.factuality(items)
        figures[f"judge.safety_{name}"] = _agreement(safety, [verdict.safe for verdict in verdicts])
        figures[f"judge.factuality_{name}"] = _agreement(factuality, [verdict.num_wrong == 0 for verdict in verdicts])
        for kind, counts in PAIR_KINDS.items():
            pairs = _pairs(groups, counts, rollouts_only=name != "heldout")
            if pairs:
                better = [a.verdict.order > b.verdict.order for _, a, b in pairs]
                figures[f"judge.pairs{kind}_{name}"] = _agreement(judge.quality(pairs), better)
    return figures


def measure_run(policy: LlamaForCausalLM, judge: TinyJudge, *, num: int, num_steps: int) -> dict[str, float]:
    """The judge on held-out documents, and the policy before and after `num_steps` DPO steps by this judge."""
    lessons = judge.lessons
    # No training pool used this seed.
    *_, (_, drifted, _) = drift(policy, lessons, judge.rewards, num_steps=num_steps, seed=99)
    chunks = heldout_chunks(lessons, num // 2)
    sets = {
        "heldout": heldout_groups(lessons, num),
        "base": roll_out(policy, lessons, chunks, seed=7),
        "drifted": roll_out(drifted, lessons, chunks, seed=8),
    }
    evaluate = partial(
        evaluate_policy, tokenizer=lessons.codec.tokenizer, world=lessons.world, num_prefixes=num, seed=1
    )
    base = evaluate(policy)
    reports = {"policy": base, "drifted": evaluate(drifted, baseline=base.continuations)}
    figures = [(name, measure, value) for name, report in reports.items() for measure, value in vars(report).items()]
    means = {f"{name}.{measure}": value.mean for name, measure, value in figures if isinstance(value, Estimate)}
    return measure_judge(judge, sets) | means


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


def _agreement(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """How often a score is above 0.5 exactly if the checker says yes."""
    return fmean((score > 0.5) == truth for score, truth in zip(scores, truths, strict=True))
