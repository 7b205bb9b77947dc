"""The story of one window: rollouts and rewrites at the same time, then the judge's verdict on all candidates.

    window --> rollout ----+
           --> rewriter ---+--> one pool of candidates per chunk --> judge --> ScoredWindow

With collector.rewrite_when = "unsafe" the judge is asked twice: while rollouts are generated, about the safety of the
originals, and only those below `unsafe_below` go to the rewriter. The second question has the seed of the first, so the
judge remembers that verdict.

Called by parts.py, many windows at once. It waits only for the three services; clients.py retries while one is down.
"""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import get_args

from services.collector.answers import RefusedRequestError
from services.collector.clients import Services
from services.collector.pools import (
    MIN_JUDGED,
    SAFE_ORIGINAL,
    Pool,
    Verdict,
    build_pools,
    count_chunks,
    judgement_item,
    original,
    sort_chunks,
)
from services.collector.windows import Window, WindowText
from services.concurrency import first_error
from shared import metrics
from shared.api import (
    JudgementFailure,
    JudgementRequest,
    Rewrite,
    RewriteItem,
    RewriteRequest,
    Rollout,
    RolloutRequest,
    TextFlaw,
)
from shared.records import NO_PREFERENCE, DroppedChunk, ScoredWindow
from shared.seeds import seed_of
from shared.settings import ScheduleStage, Settings

_NOBODYS_FAULT = frozenset({NO_PREFERENCE, SAFE_ORIGINAL, *get_args(TextFlaw)})
"""Reasons of chunks that say nothing about services or policy."""


@dataclass(frozen=True)
class DroppedWindow:
    """A window that can't be scored: a reason to count by, and the whole sentence."""

    reason: str
    detail: str
    is_in_vain: bool = True
    """It counts towards collector.max_dropped_windows. False: it lies in the document, or its candidates are equal."""


async def collect(
    window: Window, text: WindowText, *, stage: ScheduleStage, services: Services, settings: Settings
) -> ScoredWindow | DroppedWindow:
    if not window.chunks:
        return _nothing_scored(window.dropped)
    requests = _Requests(window, text, services, settings)
    try:
        rollouts, rewrites = await requests.generate(stage)
        pools = build_pools(window, text, stage=stage, rewrites=rewrites, rollouts=rollouts)
        verdicts = await requests.judge(pools) if settings.needs_judge else {}
    except RefusedRequestError as exc:
        return DroppedWindow(exc.reason, str(exc))
    scored, dropped = sort_chunks(window, pools, verdicts, objective=settings.trainer.objective, spared=requests.spared)
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
    seconds: dict[str, float] = field(default_factory=dict)
    spared: set[int] = field(default_factory=set)
    """Chunks, by index, whose originals are safe and so not rewritten."""

    @property
    def document(self) -> str:
        """Names it to the replicas: all its windows go to the same one."""
        key = self.window.key
        return f"{key.part}.{key.epoch}.{key.position}"

    async def generate(self, stage: ScheduleStage) -> tuple[Sequence[Sequence[Rollout]], Sequence[Sequence[Rewrite]]]:
        """Rollouts and rewrites per chunk; empty for a kind that the stage does not ask for."""
        try:
            async with asyncio.TaskGroup() as group:
                rollouts = group.create_task(self._roll_out(stage.num_rollouts))
                rewrites = group.create_task(self._rewrites(stage))
        except BaseExceptionGroup as failures:
            raise first_error(failures) from failures
        return rollouts.result(), rewrites.result()

    async def judge(self, pools: Sequence[Pool]) -> dict[int, Verdict]:
        """Verdicts by chunk index; a chunk with nothing to compare is not sent to the judge."""
        asked = {index: pool for index, pool in enumerate(pools) if len(pool) >= MIN_JUDGED}
        return await self._verdicts(asked) if asked else {}

    async def _verdicts(self, pools: Mapping[int, Pool], criteria: tuple[str, ...] = ()) -> dict[int, Verdict]:
        """By index of the chunk, as `pools`."""
        with self._timed("judge"):
            answer = await self.services.judge.judge(
                partial(self._judgement_request, pools, criteria), document=self.document
            )
        return dict(zip(pools, answer.judgements, strict=True))

    def _judgement_request(
        self, pools: Mapping[int, Pool], criteria: tuple[str, ...], with_token_ids: bool
    ) -> JudgementRequest:
        items = tuple(
            judgement_item(self.window, index, self.text, pool, with_token_ids=with_token_ids)
            for index, pool in pools.items()
        )
        request = JudgementRequest.model_construct(text=self.text.text, items=items, seed=self._seed("judge"))
        some = {"criteria": criteria} if criteria else {}
        ids = {"token_ids": self.window.token_ids} if with_token_ids else {}
        return request.model_copy(update=some | ids) if some or ids else request

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
            answer = await self.services.roll_out(request, document=self.document)
        return answer.rollouts

    async def _rewrites(self, stage: ScheduleStage) -> Sequence[Sequence[Rewrite]]:
        if "rewrite" not in stage.kinds:
            return ()
        indices = list(range(len(self.window.chunks)))
        if self.settings.collector.rewrite_when == "unsafe":
            self.spared.update(await self._safe_originals())
            indices = [index for index in indices if index not in self.spared]
        made = await self._rewrite(indices, stage.num_rewrites) if indices else {}
        return [made.get(index, ()) for index in range(len(self.window.chunks))]

    async def _rewrite(self, indices: Sequence[int], num_rewrites: int) -> dict[int, Sequence[Rewrite]]:
        items = tuple(
            RewriteItem(max_suffix_tokens=self.window.chunks[index].num_tokens, **asdict(self.text.spans[index]))
            for index in indices
        )
        seed = self._seed("rewrite")
        request = RewriteRequest(text=self.text.text, items=items, num_rewrites=num_rewrites, seed=seed)
        with self._timed("rewrite"):
            answer = await self.services.rewrite(request, document=self.document)
        return dict(zip(indices, answer.rewrites, strict=True))

    async def _safe_originals(self) -> list[int]:
        """Chunks whose originals the judge finds safe enough. One that it could not score is not among them."""
        names = self.settings.safety_criteria
        originals = {index: (original(self.window, self.text, index),) for index in range(len(self.window.chunks))}
        verdicts = await self._verdicts(originals, names)
        safe = []
        for index, verdict in verdicts.items():
            outcome = self._outcome(verdict, names)
            metrics.originals_checked_total.labels(outcome).inc()
            if outcome == "safe":
                safe.append(index)
        return safe

    def _outcome(self, verdict: Verdict, names: Sequence[str]) -> str:
        if isinstance(verdict, JudgementFailure):
            return "unscored"
        scores = [verdict.scores[name][0] if name in verdict.scores else None for name in names]
        if any(score is not None and score < self.settings.collector.unsafe_below for score in scores):
            return "unsafe"
        return "unscored" if None in scores else "safe"

    def _seed(self, purpose: str) -> int:
        return seed_of(self.settings.run.seed, self.window.key, purpose)

    @contextmanager
    def _timed(self, role: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent_s = time.perf_counter() - started
            self.seconds[role] = self.seconds.get(role, 0.0) + spent_s
            metrics.role_seconds_total.labels(role).inc(spent_s)


def _nothing_scored(dropped: Sequence[DroppedChunk]) -> DroppedWindow:
    reasons = sorted({chunk.reason for chunk in dropped})
    reason = NO_PREFERENCE if reasons == [NO_PREFERENCE] else "no_scored_chunks"
    detail = f"all {len(dropped)} chunks were dropped: {', '.join(reasons)}"
    return DroppedWindow(reason, detail, is_in_vain=not _NOBODYS_FAULT.issuperset(reasons))
