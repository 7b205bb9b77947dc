"""Judges the chunks of a request: every criterion on every chunk, all at once, so that the engine's batch stays full.

A chunk that one criterion can't score becomes a `JudgementFailure`, never a partial mean. An engine that fails ends
the whole request with its error, and the collector asks again.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from services.concurrency import all_of
from services.judge.criteria import Criterion, CriterionError, JudgedChunk, Scores, combined_rewards
from services.judge.verdicts import Tally
from shared.api import JudgementFailure, JudgementRequest, JudgementResponse
from shared.errors import PromptError, RequestError, TokenIdsNeededError, VerdictError
from shared.records import Judgement
from shared.seeds import question_seed

_log = logging.getLogger(__name__)

MAX_CHUNKS_AT_ONCE = 64
"""Chunks in work over all requests: several engine batches of the smallest criterion (one call a chunk)."""


@dataclass(frozen=True)
class WeightedCriterion:
    criterion: Criterion
    weight: float


class Judge:
    """Ready to judge; built by building.py once the engine runs."""

    def __init__(self, criteria: Mapping[str, WeightedCriterion], *, fingerprint: str, wants_token_ids: bool) -> None:
        self._criteria = dict(criteria)
        self._weights = {name: entry.weight for name, entry in criteria.items()}
        self._slots = asyncio.Semaphore(MAX_CHUNKS_AT_ONCE)
        self.fingerprint = fingerprint
        self._wants_token_ids = wants_token_ids
        """A criterion scores the policy's token ids."""

    async def judge(self, request: JudgementRequest) -> JudgementResponse:
        """One judgement or failure per item, in their order. Raises TokenIdsNeededError."""
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
            tallies = {name: Tally(name) for name in self._criteria}
            try:
                return await self._judge_chunk(chunk, seed=seed, tallies=tallies)
            except VerdictError as exc:
                return _failure("unreadable_verdict", exc, tallies)
            except CriterionError as exc:
                return _failure(exc.reason, exc, tallies)
            except (PromptError, RequestError) as exc:
                return _failure("unanswerable_prompt", exc, tallies)

    async def _judge_chunk(self, chunk: JudgedChunk, *, seed: int, tallies: Mapping[str, Tally]) -> Judgement:
        results: list[Scores] = await all_of(
            entry.criterion.score(chunk, seed=question_seed(seed, name), tally=tallies[name])
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
