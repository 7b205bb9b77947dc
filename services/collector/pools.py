"""The candidates of each chunk, and what the verdicts make of them. Pure but for counters. Called by collect.py.

Equal token ids are one candidate, whoever made them: a teacher's exact copy, the wanted answer for most chunks, would
else have two tickets wherever one of the best is drawn, and be compared with itself by the judge.

Records are built by `model_construct` where all their parts have been validated in a service's answer already:
checking thousands of token ids a second time was a fifth of the collector's work.
"""

from collections.abc import Mapping, Sequence

from services.collector.preparing import Window
from services.collector.texts import WindowText
from shared import metrics
from shared.api import JudgedText, JudgementFailure, JudgementItem, Rewrite, Rollout
from shared.records import NO_PREFERENCE, Candidate, DroppedChunk, Judgement, ScoredChunk, TokenIds
from shared.settings import JUDGED_OBJECTIVES, Objective, ScheduleStage

MIN_JUDGED = 2
"""Different candidates: one can't be preferred to itself."""

Pool = tuple[Candidate, ...]
"""Candidates of one chunk, no two of them equal, in the order original, rewrite, rollouts of who made them first."""

Verdict = Judgement | JudgementFailure


def build_pools(
    window: Window,
    text: WindowText,
    *,
    stage: ScheduleStage,
    rewrites: Sequence[Rewrite],
    rollouts: Sequence[Sequence[Rollout]],
) -> list[Pool]:
    """One pool per chunk. `rewrites` and `rollouts` are empty where the stage asks for none."""
    pools = []
    for index, chunk in enumerate(window.chunks):
        pool: list[Candidate] = []
        if "original" in stage.kinds:
            ids = window.token_ids[chunk.start : chunk.end]
            pool.append(Candidate(kinds=("original",), token_ids=ids, text=text.suffix(index)))
        if rewrites and (rewritten := _rewrite(rewrites[index], chunk.num_tokens)):
            pool.append(rewritten)
        if rollouts:
            pool.extend(found for rollout in rollouts[index] if (found := _rollout(rollout, chunk.num_tokens)))
        pools.append(_merged(pool))
    return pools


def judgement_item(window: Window, index: int, text: WindowText, pool: Pool, *, with_token_ids: bool) -> JudgementItem:
    """What the judge is shown of one chunk: the kinds are withheld."""
    span = text.spans[index]
    if not with_token_ids:
        texts = tuple(JudgedText.model_construct(text=candidate.text) for candidate in pool)
        return JudgementItem.model_construct(start=span.start, end=span.end, candidates=texts)
    candidates = tuple(
        JudgedText.model_construct(text=candidate.text, token_ids=candidate.token_ids) for candidate in pool
    )
    token_start = window.chunks[index].start
    return JudgementItem.model_construct(start=span.start, end=span.end, candidates=candidates, token_start=token_start)


def sort_chunks(
    window: Window, pools: Sequence[Pool], verdicts: Mapping[int, Verdict], *, objective: Objective
) -> tuple[list[ScoredChunk], list[DroppedChunk]]:
    """Chunks to train on, and those dropped with their reasons. `verdicts` by index of the chunk."""
    scored, dropped = [], [*window.dropped]
    for index, (chunk, pool) in enumerate(zip(window.chunks, pools, strict=True)):
        verdict = verdicts.get(index)
        if not _is_enough(pool, objective):
            dropped.append(DroppedChunk(start=chunk.start, reason=_why_too_few(pool)))
        elif isinstance(verdict, JudgementFailure):
            dropped.append(DroppedChunk(start=chunk.start, reason=verdict.reason))
        else:
            scored.append(ScoredChunk(start=chunk.start, candidates=pool, judgement=verdict))
    return scored, dropped


def count_chunks(scored: Sequence[ScoredChunk], dropped: Sequence[DroppedChunk]) -> None:
    """Into the metrics."""
    metrics.chunks_scored_total.inc(len(scored))
    for lost in dropped:
        metrics.chunks_dropped_total.labels(lost.reason).inc()
    for chunk in scored:
        rewards = chunk.judgement.rewards if chunk.judgement else ()
        for index, candidate in enumerate(chunk.candidates):
            for kind in candidate.kinds:
                metrics.candidates_total.labels(kind).inc()
                if rewards:
                    metrics.candidate_reward_sum.labels(kind).inc(max(0.0, rewards[index]))


def _merged(made: Sequence[Candidate]) -> Pool:
    """Text and finish reason are those of the first of each."""
    by_tokens: dict[TokenIds, list[Candidate]] = {}
    for candidate in made:
        by_tokens.setdefault(candidate.token_ids, []).append(candidate)
    return tuple(equal[0] if len(equal) == 1 else _one(equal) for equal in by_tokens.values())


def _one(equal: Sequence[Candidate]) -> Candidate:
    versions = [candidate.policy_version for candidate in equal if candidate.policy_version is not None]
    kinds = tuple(kind for candidate in equal for kind in candidate.kinds)
    return equal[0].model_copy(update={"kinds": kinds, "policy_version": min(versions, default=None)})


def _is_enough(pool: Pool, objective: Objective) -> bool:
    """One alone is the best of its pool, which is all that `rf_nll` asks for: most rollouts of a policy from scratch
    can't be shown. But a rollout that nobody judged must not teach the policy that made it."""
    if len(pool) == 1 and objective in JUDGED_OBJECTIVES:
        return objective == "rf_nll" and set(pool[0].kinds) != {"rollout"}
    return len(pool) > 0


def _why_too_few(pool: Pool) -> str:
    num_made = sum(len(candidate.kinds) for candidate in pool)
    return NO_PREFERENCE if num_made >= MIN_JUDGED else "too_few_candidates"


def _rewrite(rewrite: Rewrite, max_tokens: int) -> Candidate | None:
    reason = rewrite.refusal or _unusable(rewrite.token_ids, max_tokens)
    if reason:
        metrics.candidates_absent_total.labels("rewrite", reason).inc()
        return None
    return Candidate.model_construct(
        kinds=("rewrite",),
        token_ids=rewrite.token_ids,
        text=rewrite.text,
        policy_version=None,
        finish_reason=rewrite.finish_reason,
    )


def _rollout(rollout: Rollout, max_tokens: int) -> Candidate | None:
    reason = rollout.refusal or _unusable(rollout.token_ids, max_tokens)
    if reason:
        metrics.candidates_absent_total.labels("rollout", reason).inc()
        return None
    return Candidate.model_construct(
        kinds=("rollout",),
        token_ids=rollout.token_ids,
        text=rollout.text,
        policy_version=rollout.policy_version,
        finish_reason=rollout.finish_reason,
    )


def _unusable(token_ids: Sequence[int], max_tokens: int) -> str:
    """A word for why there is nothing to train on; empty when there is."""
    if not token_ids:
        return "empty"
    return "overlong" if len(token_ids) > max_tokens else ""
