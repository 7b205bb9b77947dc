"""The candidates of a window's chunks: pools before the judge, scored and dropped chunks after it. For collect.py.

    original, rewrites, rollouts --build_pools--> one pool per chunk --judge, sort_chunks--> scored and dropped chunks

A chunk is dropped that can give no pair:

    no_preference        all its candidates are equal
    safe_original        only its original was left to make: it is safe, and rewrites are made of unsafe ones alone
    too_few_candidates   rewrites and rollouts are missing or can't be shown (those of a policy from scratch are often
                         broken text). A run of windows of these counts towards collector.max_dropped_windows, since a
                         policy that is never trained stays as it is
    the judge's reasons
"""

from collections.abc import Collection, Mapping, Sequence

from services.collector.windows import Window, WindowText
from shared import metrics
from shared.api import JudgedText, JudgementFailure, JudgementItem, Rewrite, Rollout
from shared.objectives import OBJECTIVES
from shared.records import (
    NO_PREFERENCE,
    Candidate,
    CandidateKind,
    DroppedChunk,
    Judgement,
    ScoredChunk,
    TokenIds,
)
from shared.settings import ScheduleStage

Pool = tuple[Candidate, ...]  # the distinct candidates of one chunk, in the order original, rewrites, rollouts
Verdict = Judgement | JudgementFailure

MIN_JUDGED = 2  # different candidates: one can't be preferred to itself
SAFE_ORIGINAL = "safe_original"


def build_pools(
    window: Window,
    text: WindowText,
    *,
    stage: ScheduleStage,
    rewrites: Sequence[Sequence[Rewrite]],
    rollouts: Sequence[Sequence[Rollout]],
) -> list[Pool]:
    """One pool per chunk. `rewrites` and `rollouts` are empty where the stage asks for none; a chunk whose original is
    not to be rewritten has no rewrites."""
    pools = []
    for index, chunk in enumerate(window.chunks):
        pool: list[Candidate] = []
        if "original" in stage.kinds:
            pool.append(original(window, text, index))
        made: list[Rewrite | Rollout] = [
            *(rewrites[index] if rewrites else ()),
            *(rollouts[index] if rollouts else ()),
        ]
        pool += [found for answer in made if (found := _candidate(answer, chunk.num_tokens))]
        pools.append(_merged(pool))
    return pools


def original(window: Window, text: WindowText, index: int) -> Candidate:
    chunk = window.chunks[index]
    ids = window.token_ids[chunk.start : chunk.end]
    return Candidate(kinds=("original",), token_ids=ids, text=text.suffix(index))


def _candidate(made: Rewrite | Rollout, max_tokens: int) -> Candidate | None:
    kind: CandidateKind = "rollout" if isinstance(made, Rollout) else "rewrite"
    overlong = "overlong" if len(made.token_ids) > max_tokens else ""
    if reason := made.refusal or ("" if made.token_ids else "empty") or overlong:
        metrics.candidates_absent_total.labels(kind, reason).inc()
        return None
    return Candidate.model_construct(
        kinds=(kind,),
        token_ids=made.token_ids,
        text=made.text,
        weight_version=made.weight_version if isinstance(made, Rollout) else None,
        finish_reason=made.finish_reason,
    )


def _merged(made: Sequence[Candidate]) -> Pool:
    """Text and finish reason are those of the first of each."""
    by_tokens: dict[TokenIds, list[Candidate]] = {}
    for candidate in made:
        by_tokens.setdefault(candidate.token_ids, []).append(candidate)
    return tuple(equal[0] if len(equal) == 1 else _one(equal) for equal in by_tokens.values())


def _one(equal: Sequence[Candidate]) -> Candidate:
    versions = [candidate.weight_version for candidate in equal if candidate.weight_version is not None]
    kinds = tuple(kind for candidate in equal for kind in candidate.kinds)
    return equal[0].model_copy(update={"kinds": kinds, "weight_version": min(versions, default=None)})


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
    window: Window,
    pools: Sequence[Pool],
    verdicts: Mapping[int, Verdict],
    *,
    objective: str,
    spared: Collection[int] = (),
) -> tuple[list[ScoredChunk], list[DroppedChunk]]:
    """Chunks to train on, and those dropped with their reasons. `verdicts` by index of the chunk; `spared` are the
    indices of chunks with a safe original, of which no rewrite was made."""
    scored, dropped = [], [*window.dropped]
    for index, (chunk, pool) in enumerate(zip(window.chunks, pools, strict=True)):
        verdict = verdicts.get(index)
        if not _is_enough(pool, objective):
            dropped.append(DroppedChunk(start=chunk.start, reason=_why_too_few(pool, is_spared=index in spared)))
        elif isinstance(verdict, JudgementFailure):
            dropped.append(DroppedChunk(start=chunk.start, reason=verdict.reason))
        else:
            scored.append(ScoredChunk(start=chunk.start, candidates=pool, judgement=verdict))
    return scored, dropped


def _is_enough(pool: Pool, objective: str) -> bool:
    """A lone candidate is the best of its pool, which is enough for `rf_nll`: most rollouts of a policy from scratch
    can't be shown. But a policy must not train on its own rollout unjudged."""
    if len(pool) == 1 and OBJECTIVES[objective].judged:
        return OBJECTIVES[objective].takes_lone_candidate and set(pool[0].kinds) != {"rollout"}
    return len(pool) > 0


def _why_too_few(pool: Pool, *, is_spared: bool) -> str:
    kinds = [kind for candidate in pool for kind in candidate.kinds]
    if len(kinds) >= MIN_JUDGED:
        return NO_PREFERENCE
    return SAFE_ORIGINAL if is_spared and kinds == ["original"] else "too_few_candidates"


def count_chunks(scored: Sequence[ScoredChunk], dropped: Sequence[DroppedChunk]) -> None:
    metrics.chunks_scored_total.inc(len(scored))
    for lost in dropped:
        metrics.chunks_dropped_total.labels(lost.reason).inc()
    for chunk in scored:
        for index, candidate in enumerate(chunk.candidates):
            for kind in candidate.kinds:
                metrics.candidates_total.labels(kind).inc()
                if chunk.judgement:
                    _count_verdict(chunk.judgement, index, kind)


def _count_verdict(judgement: Judgement, index: int, kind: CandidateKind) -> None:
    """The mean reward of a kind is candidate_reward_sum / candidates_scored_total: some candidates have none."""
    if index in judgement.barred:
        metrics.candidates_barred_total.labels(kind).inc()
    if (reward := judgement.rewards[index]) is not None:
        metrics.candidates_scored_total.labels(kind).inc()
        metrics.candidate_reward_sum.labels(kind).inc(reward)
