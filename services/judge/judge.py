"""Judges the chunks of a request: every criterion on every chunk at once, so that the engine's batches stay full.

A candidate that some criterion can't score has no reward; a chunk with fewer than two rewards is a `JudgementFailure`.
If the engine fails for longer than its patience, the whole request fails with its error. The collector asks again, and
finished verdicts are remembered (asker.py).
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from services.concurrency import all_of
from services.frames import nonce_of
from services.judge.criteria import Criterion, CriterionError, JudgedChunk, Scores
from services.judge.rewards import Rule, combine
from services.judge.verdicts import CallCount
from shared.api import JudgementFailure, JudgementRequest, JudgementResponse
from shared.errors import RequestError, TokenIdsNeededError
from shared.records import Judgement
from shared.seeds import question_seed

_log = logging.getLogger(__name__)

MAX_CHUNKS_AT_ONCE = 64
"""Over all requests, in order of arrival: several engine batches of the smallest criterion (one call a chunk)."""
MIN_SCORED = 2
"""Candidates with a reward: one alone has no best and worst."""


class Judge:
    """Built by build.py once the engines have started."""

    def __init__(
        self,
        criteria: Mapping[str, Criterion],
        *,
        rules: Mapping[str, Rule],
        fingerprint: str,
        token_criteria: frozenset[str] = frozenset(),
    ) -> None:
        """`token_criteria` score the policy's token ids."""
        self._criteria = criteria
        self._rules = rules
        self._slots = asyncio.Semaphore(MAX_CHUNKS_AT_ONCE)
        self._turns = itertools.count()
        self.fingerprint = fingerprint
        self._token_criteria = token_criteria

    @property
    def wants_token_ids(self) -> bool:
        """A criterion scores the policy's token ids."""
        return bool(self._token_criteria)

    async def judge(self, request: JudgementRequest) -> JudgementResponse:
        """One judgement or failure per item, in order. Raises TokenIdsNeededError, or RequestError for a criterion that
        this judge does not have."""
        criteria = self._chosen(request)
        if not request.token_ids and self._token_criteria & criteria.keys():
            raise TokenIdsNeededError(
                "this judge scores the policy's token ids (likelihood): give `token_ids` of the window, and with each "
                "item its `token_start` and its candidates' `token_ids`"
            )
        turn, nonce = next(self._turns), await asyncio.to_thread(_nonce, request)
        judgements = await all_of(
            # By place in the text: a request for some of the chunks asks the same questions.
            self._in_turn(
                JudgedChunk(request, item, turn, nonce), criteria, seed=question_seed(request.seed, item.start)
            )
            for item in request.items
        )
        return JudgementResponse(judgements=tuple(judgements), wants_token_ids=self.wants_token_ids)

    def _chosen(self, request: JudgementRequest) -> Mapping[str, Criterion]:
        if unknown := sorted(set(request.criteria) - self._criteria.keys()):
            known = ", ".join(self._criteria)
            raise RequestError(f"this judge has no criterion {', '.join(unknown)}; it has {known}")
        return {name: one for name, one in self._criteria.items() if not request.criteria or name in request.criteria}

    async def _in_turn(
        self, chunk: JudgedChunk, criteria: Mapping[str, Criterion], *, seed: int
    ) -> Judgement | JudgementFailure:
        counts = {name: CallCount(name) for name in criteria}
        try:
            async with self._slots:
                return await self._judge_chunk(chunk, criteria, seed=seed, counts=counts)
        except CriterionError as exc:
            _log.warning("chunk not judged: %s", exc, extra={"reason": exc.reason})
            return JudgementFailure(reason=exc.reason, num_calls=_num_calls(counts), num_failures=_num_failures(counts))

    async def _judge_chunk(
        self,
        chunk: JudgedChunk,
        criteria: Mapping[str, Criterion],
        *,
        seed: int,
        counts: Mapping[str, CallCount],
    ) -> Judgement:
        results: list[Scores] = await all_of(
            criterion.score(chunk, seed=question_seed(seed, name), count=counts[name])
            for name, criterion in criteria.items()
        )
        scores = {name: tuple(result.values) for name, result in zip(criteria, results, strict=True)}
        found = combine(scores, self._rules)
        _refuse_unscored(found.rewards, [cause for result in results for cause in result.causes])
        return Judgement(
            rewards=tuple(found.rewards),
            scores=scores,
            barred=found.barred,
            comparisons=tuple(comparison for result in results for comparison in result.comparisons),
            reasoning=next((result.reasoning for result in results if result.reasoning), ""),
            fingerprint=self.fingerprint,
            num_calls=_num_calls(counts),
            num_failures=_num_failures(counts),
        )


def _nonce(request: JudgementRequest) -> str:
    return nonce_of(request.text, (candidate.text for item in request.items for candidate in item.candidates))


def _refuse_unscored(rewards: Sequence[float | None], causes: Sequence[str]) -> None:
    """Raise CriterionError if too few candidates have a reward to tell the best and the worst."""
    num_scored = sum(reward is not None for reward in rewards)
    if num_scored >= min(MIN_SCORED, len(rewards)):
        return
    reason = "unanswerable_prompt" if set(causes) == {"refused"} else "unreadable_verdict"
    why = ", ".join(f"{number} {cause}" for cause, number in sorted(Counter(causes).items())) or "no scores"
    raise CriterionError(reason, f"{num_scored} of {len(rewards)} candidates have a reward: {why}")


def _num_calls(counts: Mapping[str, CallCount]) -> int:
    return sum(count.num_calls for count in counts.values())


def _num_failures(counts: Mapping[str, CallCount]) -> int:
    return sum(count.num_failures for count in counts.values())
