"""The candidates of each chunk, and what the verdicts make of them. Pure but for counters. Called by collect.py.

Records are built by `model_construct` where all their parts have been validated in a service's answer already:
checking thousands of token ids a second time was a fifth of the collector's work.
"""

from collections.abc import Mapping, Sequence

from services.collector.preparing import Window
from services.collector.texts import WindowText
from shared import metrics
from shared.api import JudgedText, JudgementFailure, JudgementItem, Rewrite, Rollout
from shared.records import Candidate, DroppedChunk, Judgement, ScoredChunk
from shared.settings import ScheduleStage

MIN_JUDGED = 2
"""One candidate can't be preferred to another."""

Pool = tuple[Candidate, ...]
"""Candidates of one chunk: original, rewrite, rollouts, in this order. Equal ones are kept: the trainer decides."""

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
            pool.append(Candidate(kind="original", token_ids=ids, text=text.suffix(index)))
        if rewrites and (rewritten := _rewrite(rewrites[index], chunk.num_tokens)):
            pool.append(rewritten)
        if rollouts:
            pool.extend(found for rollout in rollouts[index] if (found := _rollout(rollout, chunk.num_tokens)))
        pools.append(tuple(pool))
    return pools


def judgement_item(window: Window, index: int, text: WindowText, pool: Pool) -> JudgementItem:
    """What the judge is shown of one chunk: the kinds are withheld."""
    return JudgementItem.model_construct(
        prefix=text.prefix(index),
        candidates=tuple(
            JudgedText.model_construct(text=candidate.text, token_ids=candidate.token_ids) for candidate in pool
        ),
        reference=text.suffix(index),
        prefix_token_ids=window.token_ids[: window.chunks[index].start],
    )


def sort_chunks(
    window: Window, pools: Sequence[Pool], verdicts: Mapping[int, Verdict], *, needs_judge: bool
) -> tuple[list[ScoredChunk], list[DroppedChunk]]:
    """Chunks to train on, and those dropped with their reasons. `verdicts` by index of the chunk."""
    scored, dropped = [], [*window.dropped]
    for index, (chunk, pool) in enumerate(zip(window.chunks, pools, strict=True)):
        verdict = verdicts.get(index)
        if len(pool) < (MIN_JUDGED if needs_judge else 1):
            dropped.append(DroppedChunk(start=chunk.start, reason="too_few_candidates"))
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
            metrics.candidates_total.labels(candidate.kind).inc()
            if rewards:
                metrics.candidate_reward_sum.labels(candidate.kind).inc(max(0.0, rewards[index]))


def _rewrite(rewrite: Rewrite, max_tokens: int) -> Candidate | None:
    reason = rewrite.refusal or _unusable(rewrite.token_ids, max_tokens)
    if reason:
        metrics.candidates_absent_total.labels("rewrite", reason).inc()
        return None
    return Candidate.model_construct(
        kind="rewrite",
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
        kind="rollout",
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
