"""The likelihood criterion: how probable a candidate is, per token, under the judge's own model."""

import asyncio
import math
from dataclasses import dataclass
from statistics import fmean

from services.engine.base import Engine, Prompt
from services.judge.criteria import CriterionError, JudgedChunk, Scores, scores_within_group
from services.judge.verdicts import Tally


@dataclass(frozen=True)
class TokenReading:
    """How texts become tokens of the judge's model."""

    shares_policy_tokens: bool
    """The policy's token ids mean the same to the judge's model, so they are scored as they were sampled, and every
    request must have them."""
    beginning: int | None
    """The token that the model wants before every text (BOS), if it wants one."""


class Likelihood:
    """score = sigmoid((mean log-prob per token - mean of the group) / scale); one engine call per chunk."""

    def __init__(
        self,
        engine: Engine,
        *,
        reading: TokenReading,
        scale: float,
        max_prefix_characters: int,
        gate: asyncio.Semaphore,
    ) -> None:
        self._engine = engine
        self._reading = reading
        self._scale = scale
        self._max_prefix_characters = max_prefix_characters
        self._gate = gate

    async def score(self, chunk: JudgedChunk, *, seed: int, tally: Tally) -> Scores:
        prompt, continuations = self._tokens(chunk)
        async with self._gate:
            tally.count_calls(1)
            log_probs = await self._engine.score(prompt, continuations)
        means = [fmean(row) for row in log_probs]
        if not all(math.isfinite(mean) for mean in means):
            raise CriterionError("not_finite", f"likelihood: log-probs per token must be finite, got {means}")
        return Scores(scores_within_group(means, scale=self._scale))

    def _tokens(self, chunk: JudgedChunk) -> tuple[Prompt, list[Prompt]]:
        """The candidates' own token ids where they mean the same here, otherwise the tokens of their texts."""
        if self._reading.shares_policy_tokens:
            return list(chunk.prefix_token_ids), [candidate.token_ids for candidate in chunk.candidates]
        if not all(candidate.text for candidate in chunk.candidates):
            raise CriterionError("empty_candidate", "likelihood: an empty candidate has no tokens to score")
        prefix = chunk.end_of_prefix(self._max_prefix_characters)
        return self._prompt(prefix), [candidate.text for candidate in chunk.candidates]

    def _prompt(self, prefix: str) -> Prompt:
        if self._reading.beginning is not None:
            return [self._reading.beginning, *self._engine.encode(prefix)]
        if not prefix:
            raise CriterionError(
                "empty_prefix", "likelihood: the prefix is empty and the judge's model has no token to begin a text"
            )
        return prefix
