"""The story of one window: rollouts and rewrites at the same time, then the judge's verdict on all candidates.

    window --> rollout ----+
           --> rewriter ---+--> one pool of candidates per chunk --> judge --> ScoredWindow

Called by parts.py, many windows at once. It waits only for the three services; clients.py retries while one is down.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from services.collector.clients import RefusedRequestError, Services
from services.collector.windows import Window, WindowText
from services.concurrency import first_error
from shared import metrics
from shared.api import (
    JudgedText,
    JudgementFailure,
    JudgementItem,
    JudgementRequest,
    Rewrite,
    RewriteItem,
    RewriteRequest,
    Rollout,
    RolloutRequest,
)
from shared.objectives import OBJECTIVES
from shared.records import (
    NO_PREFERENCE,
    Candidate,
    CandidateKind,
    DroppedChunk,
    Judgement,
    ScoredChunk,
    ScoredWindow,
    TokenIds,
)
from shared.seeds import seed_of
from shared.settings import ScheduleStage, Settings


@dataclass(frozen=True)
class DroppedWindow:
    """A window that can't be scored: a reason to count by, and the whole sentence."""

    reason: str
    detail: str


Pool = tuple[Candidate, ...]  # the distinct candidates of one chunk, in the order original, rewrite, rollouts
Verdict = Judgement | JudgementFailure

MIN_JUDGED = 2  # different candidates: one can't be preferred to itself


async def collect(
    window: Window, text: WindowText, *, stage: ScheduleStage, services: Services, settings: Settings
) -> ScoredWindow | DroppedWindow:
    if not window.chunks:
        return _nothing_scored(window.dropped)
    requests = _Requests(window, text, services, settings, seconds={})
    try:
        rollouts, rewrites = await requests.generate(stage)
        pools = build_pools(window, text, stage=stage, rewrites=rewrites, rollouts=rollouts)
        verdicts = await requests.judge(pools) if settings.needs_judge else {}
    except RefusedRequestError as exc:
        return DroppedWindow(exc.reason, str(exc))
    scored, dropped = sort_chunks(window, pools, verdicts, objective=settings.trainer.objective)
    count_chunks(scored, dropped)
    if not scored:
        return _nothing_scored(dropped)
    return ScoredWindow(
        run_id=settings.run.name,
        key=window.key,
        source_id=window.source_id,
        token_ids=window.token_ids,
        chunks=tuple(scored),
        dropped_chunks=tuple(dropped),
        read_at=window.read_at,
        scored_at=time.time(),
        seconds=requests.seconds,
    )


@dataclass(frozen=True)
class _Requests:
    """The requests for one window. Seeds come from its key, so a window that is redone sends the same requests."""

    window: Window
    text: WindowText
    services: Services
    settings: Settings
    seconds: dict[str, float]

    async def generate(self, stage: ScheduleStage) -> tuple[Sequence[Sequence[Rollout]], Sequence[Sequence[Rewrite]]]:
        """Rollouts and rewrites per chunk; empty for a kind that the stage does not ask for."""
        try:
            async with asyncio.TaskGroup() as group:
                rollouts = group.create_task(self._roll_out(stage.num_rollouts))
                rewrites = group.create_task(self._rewrite(stage))
        except BaseExceptionGroup as failures:
            raise first_error(failures) from failures
        return rollouts.result(), rewrites.result()

    async def judge(self, pools: Sequence[Pool]) -> dict[int, Verdict]:
        """Verdicts by chunk index; a chunk with nothing to compare is not sent to the judge."""
        asked = [index for index, pool in enumerate(pools) if len(pool) >= MIN_JUDGED]
        if not asked:
            return {}
        with self._timed("judge"):
            answer = await self.services.judge.judge(
                partial(self._judgement_request, {index: pools[index] for index in asked})
            )
        _expect("judge", "verdicts", len(answer.judgements), len(asked))
        for index, verdict in zip(asked, answer.judgements, strict=True):
            if not isinstance(verdict, JudgementFailure):
                _expect("judge", "rewards", len(verdict.rewards), len(pools[index]))
        return dict(zip(asked, answer.judgements, strict=True))

    def _judgement_request(self, pools: Mapping[int, Pool], with_token_ids: bool) -> JudgementRequest:
        """`pools` by index of the chunk."""
        items = tuple(
            judgement_item(self.window, index, self.text, pool, with_token_ids=with_token_ids)
            for index, pool in pools.items()
        )
        request = JudgementRequest.model_construct(text=self.text.text, items=items, seed=self._seed("judge"))
        return request.model_copy(update={"token_ids": self.window.token_ids}) if with_token_ids else request

    async def _roll_out(self, num_rollouts: int) -> Sequence[Sequence[Rollout]]:
        if not num_rollouts:
            return ()
        request = RolloutRequest(
            token_ids=self.window.token_ids,
            starts=tuple(chunk.start for chunk in self.window.chunks),
            num_rollouts=num_rollouts,
            max_suffix_tokens=tuple(chunk.num_tokens for chunk in self.window.chunks),
            temperature=self.settings.rollout.temperature,
            top_p=self.settings.rollout.top_p,
            seed=self._seed("rollout"),
        )
        with self._timed("rollout"):
            answer = await self.services.roll_out(request)
        _expect("rollout", "chunks", len(answer.rollouts), len(self.window.chunks))
        for group in answer.rollouts:
            _expect("rollout", "rollouts of a chunk", len(group), num_rollouts)
        return answer.rollouts

    async def _rewrite(self, stage: ScheduleStage) -> Sequence[Sequence[Rewrite]]:
        if "rewrite" not in stage.kinds:
            return ()
        items = tuple(
            RewriteItem(max_suffix_tokens=chunk.num_tokens, **asdict(span))
            for chunk, span in zip(self.window.chunks, self.text.spans, strict=True)
        )
        request = RewriteRequest(text=self.text.text, items=items, seed=self._seed("rewrite"))
        with self._timed("rewrite"):
            answer = await self.services.rewrite(request)
        _expect("rewrite", "rewrites", len(answer.rewrites), len(items))
        return answer.rewrites

    def _seed(self, purpose: str) -> int:
        return seed_of(self.settings.run.seed, self.window.key, purpose)

    @contextmanager
    def _timed(self, role: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[role] = time.perf_counter() - started
            metrics.role_seconds_total.labels(role).inc(self.seconds[role])


def _nothing_scored(dropped: Sequence[DroppedChunk]) -> DroppedWindow:
    reasons = sorted({chunk.reason for chunk in dropped})
    reason = NO_PREFERENCE if reasons == [NO_PREFERENCE] else "no_scored_chunks"
    return DroppedWindow(reason, f"all {len(dropped)} chunks were dropped: {', '.join(reasons)}")


def _expect(role: str, what: str, found: int, expected: int) -> None:
    """Refuse an answer whose shape does not fit the request."""
    if found != expected:
        raise RefusedRequestError(f"{role} answered {found} {what}, expected {expected}", reason=f"{role}_refused")


def build_pools(
    window: Window,
    text: WindowText,
    *,
    stage: ScheduleStage,
    rewrites: Sequence[Sequence[Rewrite]],
    rollouts: Sequence[Sequence[Rollout]],
) -> list[Pool]:
    """One pool per chunk. `rewrites` and `rollouts` are empty where the stage asks for none."""
    pools = []
    for index, chunk in enumerate(window.chunks):
        pool: list[Candidate] = []
        if "original" in stage.kinds:
            ids = window.token_ids[chunk.start : chunk.end]
            pool.append(Candidate(kinds=("original",), token_ids=ids, text=text.suffix(index)))
        made: list[Rewrite | Rollout] = [
            *(rewrites[index] if rewrites else ()),
            *(rollouts[index] if rollouts else ()),
        ]
        pool += [found for answer in made if (found := _candidate(answer, chunk.num_tokens))]
        pools.append(_merged(pool))
    return pools


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
    window: Window, pools: Sequence[Pool], verdicts: Mapping[int, Verdict], *, objective: str
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


def _is_enough(pool: Pool, objective: str) -> bool:
    """A lone candidate is the best of its pool, which is enough for `rf_nll`: most rollouts of a policy from scratch
    can't be shown. But a policy must not train on its own rollout unjudged."""
    if len(pool) == 1 and OBJECTIVES[objective].judged:
        return OBJECTIVES[objective].takes_lone_candidate and set(pool[0].kinds) != {"rollout"}
    return len(pool) > 0


def _why_too_few(pool: Pool) -> str:
    num_made = sum(len(candidate.kinds) for candidate in pool)
    return NO_PREFERENCE if num_made >= MIN_JUDGED else "too_few_candidates"


def count_chunks(scored: Sequence[ScoredChunk], dropped: Sequence[DroppedChunk]) -> None:
    metrics.chunks_scored_total.inc(len(scored))
    for lost in dropped:
        metrics.chunks_dropped_total.labels(lost.reason).inc()
    for chunk in scored:
        rewards = chunk.judgement.rewards if chunk.judgement else ()
        for index, candidate in enumerate(chunk.candidates):
            for kind in candidate.kinds:
                metrics.candidates_total.labels(kind).inc()
                if rewards and (reward := rewards[index]) is not None:
                    metrics.candidate_reward_sum.labels(kind).inc(reward)
