"""The story of one document window: continuations and rewrites at the same time, then the verdict on all of them.

    window --> rollout ----+
           --> rewriter ---+--> candidates --> judge --> ScoredDocument

Called by parts.py, many windows at once. Nothing here waits but for the three services; how they are asked again
while they are away is clients.py, what becomes a candidate is pools.py.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from services.collector.clients import RefusedRequestError, Services
from services.collector.failures import first_error
from services.collector.pools import MIN_JUDGED, Pool, Verdict, build_pools, count_chunks, judgement_item, sort_chunks
from services.collector.preparing import Window
from services.collector.seeds import seed_of
from services.collector.texts import WindowText
from shared import metrics
from shared.api import JudgementFailure, JudgementRequest, Rewrite, RewriteItem, RewriteRequest, Rollout, RolloutRequest
from shared.records import NO_PREFERENCE, DroppedChunk, ScoredDocument
from shared.settings import ScheduleStage, Settings


@dataclass(frozen=True)
class DroppedWindow:
    """A window that can't be scored: its reason in the ledger, and the whole sentence."""

    reason: str
    detail: str


async def collect(
    window: Window, text: WindowText, *, stage: ScheduleStage, services: Services, settings: Settings
) -> ScoredDocument | DroppedWindow:
    """The window with its chunks scored. `text` is that of the window."""
    if not window.chunks:
        return _nothing_scored(window.dropped)
    asking = _Asking(window, text, services, settings, seconds={})
    try:
        rollouts, rewrites = await asking.generate(stage)
        pools = build_pools(window, text, stage=stage, rewrites=rewrites, rollouts=rollouts)
        verdicts = await asking.judge(pools) if settings.needs_judge else {}
    except RefusedRequestError as exc:
        return DroppedWindow(exc.reason, str(exc))
    scored, dropped = sort_chunks(window, pools, verdicts, objective=settings.trainer.objective)
    count_chunks(scored, dropped)
    if not scored:
        return _nothing_scored(dropped)
    return ScoredDocument(
        run_id=settings.run.name,
        key=window.key,
        source_id=window.source_id,
        token_ids=window.token_ids,
        chunks=tuple(scored),
        dropped_chunks=tuple(dropped),
        read_at=window.read_at,
        scored_at=time.time(),
        seconds=asking.seconds,
    )


@dataclass(frozen=True)
class _Asking:
    """The requests for one window. Seeds come from its key: a window that is redone asks the same again."""

    window: Window
    text: WindowText
    services: Services
    settings: Settings
    seconds: dict[str, float]

    async def generate(self, stage: ScheduleStage) -> tuple[Sequence[Sequence[Rollout]], Sequence[Rewrite]]:
        """Rollouts and rewrites per chunk; empty for a kind that the stage does not ask for."""
        try:
            async with asyncio.TaskGroup() as group:
                rollouts = group.create_task(self._roll_out(stage.num_rollouts))
                rewrites = group.create_task(self._rewrite() if "rewrite" in stage.kinds else _nothing())
        except BaseExceptionGroup as failures:
            raise first_error(failures) from failures
        return rollouts.result(), rewrites.result()

    async def judge(self, pools: Sequence[Pool]) -> dict[int, Verdict]:
        """Verdicts by index of the chunk; a chunk with nothing to compare is not shown to the judge."""
        asked = [index for index, pool in enumerate(pools) if len(pool) >= MIN_JUDGED]
        if not asked:
            return {}
        with self._timed("judge"):
            answer = await self.services.judge_candidates(
                lambda *, with_token_ids: self._judgement_request(
                    {index: pools[index] for index in asked}, with_token_ids=with_token_ids
                )
            )
        _expect("judge", "verdicts", len(answer.judgements), len(asked))
        for index, verdict in zip(asked, answer.judgements, strict=True):
            if not isinstance(verdict, JudgementFailure):
                _expect("judge", "rewards", len(verdict.rewards), len(pools[index]))
        return dict(zip(asked, answer.judgements, strict=True))

    def _judgement_request(self, pools: Mapping[int, Pool], *, with_token_ids: bool) -> JudgementRequest:
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
        with self._timed("generate"):
            answer = await self.services.continue_prefixes(request)
        _expect("rollout", "chunks", len(answer.rollouts), len(self.window.chunks))
        for group in answer.rollouts:
            _expect("rollout", "rollouts of a chunk", len(group), num_rollouts)
        return answer.rollouts

    async def _rewrite(self) -> Sequence[Rewrite]:
        items = tuple(
            RewriteItem(
                start=span.start,
                end=span.end,
                max_suffix_tokens=chunk.num_tokens,
                begins_text=span.begins_text,
                ends_document=span.ends_document,
            )
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


async def _nothing() -> Sequence[Rewrite]:
    return ()


def _expect(role: str, what: str, found: int, expected: int) -> None:
    """An answer of another shape than its request is refused, never padded."""
    if found != expected:
        raise RefusedRequestError(f"{role} answered {found} {what}, expected {expected}", reason=f"{role}_refused")
