"""Judges the chunks of a request: every criterion on every chunk at once, so that the engine's batches stay full.

A chunk that some criterion can't score becomes a `JudgementFailure`, never a partial mean. If the engine fails, the
whole request fails with its error and the collector retries it.
"""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class WeightedCriterion:
    criterion: Criterion
    weight: float


class Judge:
    """Built by build.py once the engine has started."""

    def __init__(self, criteria: Mapping[str, WeightedCriterion], *, fingerprint: str, wants_token_ids: bool) -> None:
        self._criteria = dict(criteria)
        self._weights = {name: entry.weight for name, entry in criteria.items()}
        self._slots = asyncio.Semaphore(MAX_CHUNKS_AT_ONCE)
        self.fingerprint = fingerprint
        self._wants_token_ids = wants_token_ids
        """A criterion scores the policy's token ids."""

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
        async with self._slots:
            counts = {name: CallCount(name) for name in self._criteria}
            try:
                return await self._judge_chunk(chunk, seed=seed, counts=counts)
            except VerdictError as exc:
                return _failure("unreadable_verdict", exc, counts)
            except CriterionError as exc:
                return _failure(exc.reason, exc, counts)
            except (PromptError, RequestError) as exc:
                return _failure("unanswerable_prompt", exc, counts)

    async def _judge_chunk(self, chunk: JudgedChunk, *, seed: int, counts: Mapping[str, CallCount]) -> Judgement:
        results: list[Scores] = await all_of(
            entry.criterion.score(chunk, seed=question_seed(seed, name), count=counts[name])
            for name, entry in self._criteria.items()
        )
        scores = {name: tuple(result.values) for name, result in zip(self._criteria, results, strict=True)}
        return Judgement(
            rewards=tuple(combined_rewards(scores, self._weights)),
            scores=scores,
            reasoning=next((result.reasoning for result in results if result.reasoning), ""),
            fingerprint=self.fingerprint,
            **_totals(counts),
        )


def combined_rewards(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Per candidate the weighted mean over the criteria."""
    total = math.fsum(weights[name] for name in scores)
    columns = zip(*scores.values(), strict=True)
    shares = [weights[name] / total for name in scores]
    return [
        min(1.0, math.fsum(share * score for share, score in zip(shares, column, strict=True))) for column in columns
    ]


def _failure(reason: str, error: Exception, counts: Mapping[str, CallCount]) -> JudgementFailure:
    _log.warning("chunk not judged: %s", error, extra={"reason": reason})
    return JudgementFailure(reason=reason, **_totals(counts))


def _totals(counts: Mapping[str, CallCount]) -> dict[str, int]:
    return {
        "num_calls": sum(count.num_calls for count in counts.values()),
        "num_failures": sum(count.num_failures for count in counts.values()),
    }
