"""Judges the chunks of a request: every criterion on every chunk, all at once, so that the engine's batch stays full.

A chunk that one criterion can't score becomes a `JudgementFailure`, never a partial mean. An engine that fails ends
the whole request with its error, and the collector asks again.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from services.concurrency import all_of
from services.judge.asking import Tally, derived_seed
from services.judge.criteria import Criterion, CriterionError, Scores
from services.judge.rewards import combined_rewards
from shared.api import JudgementFailure, JudgementItem, JudgementRequest, JudgementResponse
from shared.errors import PromptError, RequestError, VerdictError
from shared.records import Judgement

_log = logging.getLogger(__name__)

MAX_CHUNKS_AT_ONCE = 64
"""Chunks in work over all requests: several engine batches of the smallest criterion (one call a chunk)."""


@dataclass(frozen=True)
class WeightedCriterion:
    criterion: Criterion
    weight: float


class Judge:
    """Ready to judge; built by building.py once the engine runs."""

    def __init__(self, criteria: Mapping[str, WeightedCriterion], *, fingerprint: str) -> None:
        self._criteria = dict(criteria)
        self._weights = {name: entry.weight for name, entry in criteria.items()}
        self._slots = asyncio.Semaphore(MAX_CHUNKS_AT_ONCE)
        self.fingerprint = fingerprint

    async def judge(self, request: JudgementRequest) -> JudgementResponse:
        """One judgement or failure per item, in their order."""
        judgements = await all_of(
            self._in_turn(item, seed=derived_seed(request.seed, place)) for place, item in enumerate(request.items)
        )
        return JudgementResponse(judgements=tuple(judgements))

    async def _in_turn(self, item: JudgementItem, *, seed: int) -> Judgement | JudgementFailure:
        async with self._slots:
            tallies = {name: Tally(name) for name in self._criteria}
            try:
                return await self._judge_chunk(item, seed=seed, tallies=tallies)
            except VerdictError as exc:
                return _failure("unreadable_verdict", exc, tallies)
            except CriterionError as exc:
                return _failure(exc.reason, exc, tallies)
            except (PromptError, RequestError) as exc:
                return _failure("unanswerable_prompt", exc, tallies)

    async def _judge_chunk(self, item: JudgementItem, *, seed: int, tallies: Mapping[str, Tally]) -> Judgement:
        results: list[Scores] = await all_of(
            entry.criterion.score(item, seed=derived_seed(seed, name), tally=tallies[name])
            for name, entry in self._criteria.items()
        )
        scores = {name: tuple(result.values) for name, result in zip(self._criteria, results, strict=True)}
        return Judgement(
            rewards=tuple(combined_rewards(scores, self._weights)),
            scores=scores,
            reasoning=next((result.reasoning for result in results if result.reasoning), ""),
            num_calls=sum(tally.num_calls for tally in tallies.values()),
            num_failures=sum(tally.num_failures for tally in tallies.values()),
            fingerprint=self.fingerprint,
        )


def _failure(reason: str, error: Exception, tallies: Mapping[str, Tally]) -> JudgementFailure:
    _log.warning("chunk not judged: %s", error, extra={"reason": reason})
    return JudgementFailure(
        reason=reason,
        num_calls=sum(tally.num_calls for tally in tallies.values()),
        num_failures=sum(tally.num_failures for tally in tallies.values()),
    )
