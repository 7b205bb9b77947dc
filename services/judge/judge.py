"""Judges the chunks of a request: every criterion on every chunk at once, so that the engine's batches stay full.

A chunk that some criterion can't score becomes a `JudgementFailure`, never a partial mean. If the engine fails, the
whole request fails with its error and the collector retries it.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

from services.concurrency import all_of
from services.judge.criteria import Criterion, CriterionError, JudgedChunk, Scores
from services.judge.verdicts import CallCount
from shared.api import JudgementFailure, JudgementRequest, JudgementResponse
from shared.errors import PromptError, RequestError, TokenIdsNeededError, VerdictError
from shared.records import Judgement
from shared.seeds import question_seed

_log = logging.getLogger(__name__)

MAX_CHUNKS_AT_ONCE = 64
"""Over all requests: several engine batches of the smallest criterion (one call a chunk)."""


class Judge:
    """Built by build.py once the engine has started."""

    def __init__(
        self,
        criteria: Mapping[str, Criterion],
        *,
        weights: Mapping[str, float],
        fingerprint: str,
        wants_token_ids: bool,
    ) -> None:
        """`wants_token_ids`: a criterion scores the policy's token ids."""
        self._criteria = criteria
        self._weights = weights
        self._slots = asyncio.Semaphore(MAX_CHUNKS_AT_ONCE)
        self.fingerprint = fingerprint
        self._wants_token_ids = wants_token_ids

    async def judge(self, request: JudgementRequest) -> JudgementResponse:
        """One judgement or failure per item, in order. Raises TokenIdsNeededError."""
        if self._wants_token_ids and not request.token_ids:
            raise TokenIdsNeededError(
                "this judge scores the policy's token ids (likelihood): give `token_ids` of the window, and with each "
                "item its `token_start` and its candidates' `token_ids`"
            )
        judgements = await all_of(
            self._in_turn(JudgedChunk(request, item), seed=question_seed(request.seed, place))
            for place, item in enumerate(request.items)
        )
        return JudgementResponse(judgements=tuple(judgements), wants_token_ids=self._wants_token_ids)

    async def _in_turn(self, chunk: JudgedChunk, *, seed: int) -> Judgement | JudgementFailure:
        counts = {name: CallCount(name) for name in self._criteria}
        try:
            async with self._slots:
                return await self._judge_chunk(chunk, seed=seed, counts=counts)
        except (VerdictError, CriterionError, PromptError, RequestError) as exc:
            if isinstance(exc, CriterionError):
                reason = exc.reason
            else:
                reason = "unreadable_verdict" if isinstance(exc, VerdictError) else "unanswerable_prompt"
            _log.warning("chunk not judged: %s", exc, extra={"reason": reason})
            return JudgementFailure(reason=reason, **_totals(counts))

    async def _judge_chunk(self, chunk: JudgedChunk, *, seed: int, counts: Mapping[str, CallCount]) -> Judgement:
        results: list[Scores] = await all_of(
            criterion.score(chunk, seed=question_seed(seed, name), count=counts[name])
            for name, criterion in self._criteria.items()
        )
        scores = {name: tuple(result.values) for name, result in zip(self._criteria, results, strict=True)}
        return Judgement(
            rewards=tuple(combined_rewards(scores, self._weights)),
            scores=scores,
            reasoning=next((result.reasoning for result in results if result.reasoning), ""),
            fingerprint=self.fingerprint,
            **_totals(counts),
        )


def combined_rewards(scores: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float | None]:
    """Per candidate the weighted mean over the criteria; None if one of them could not score it."""
    total = math.fsum(weights[name] for name in scores)
    columns = zip(*scores.values(), strict=True)
    shares = [weights[name] / total for name in scores]
    return [_weighted_mean(column, shares) for column in columns]


def _weighted_mean(scores: Sequence[float | None], shares: Sequence[float]) -> float | None:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    return min(1.0, math.fsum(share * score for share, score in zip(shares, known, strict=True)))


def _totals(counts: Mapping[str, CallCount]) -> dict[str, int]:
    return {
        "num_calls": sum(count.num_calls for count in counts.values()),
        "num_failures": sum(count.num_failures for count in counts.values()),
    }
