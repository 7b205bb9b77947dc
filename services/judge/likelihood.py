"""The likelihood criterion: how probable a candidate is, per token, under the judge's own model.

A candidate whose log-probs are no numbers, or that has no token to score, is unscored; the others keep their scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from services.engine.base import Prompt
from services.judge.asker import Asker
from services.judge.criteria import CriterionError, JudgedChunk, Scores
from services.judge.verdicts import CallCount
from services.tokenizer import load_tokenizer, same_tokens
from shared.settings import Settings


@dataclass(frozen=True)
class TokenReading:
    """How texts become tokens of the judge's model."""

    shares_policy_tokens: bool
    """The judge's tokenizer is the policy's: token ids are scored as sampled, and every request needs them. Otherwise
    the texts are scored."""
    beginning: int | None
    """The token (BOS) that the model wants before every text, if any."""


def token_reading(settings: Settings, criterion: str) -> TokenReading:
    """Compares the tokenizer of the criterion's engine with the policy's. Loads both, so call it from a thread.

    An endpoint always gets texts: it tokenises them and adds the BOS itself.
    """
    engine = settings.judge.engine_of(criterion)
    if engine.kind == "openai":
        return TokenReading(shares_policy_tokens=False, beginning=None)
    judge = load_tokenizer(engine.model, setting="judge.engine.model")
    source = settings.policy.tokenizer_source
    shared = bool(source) and same_tokens(judge, load_tokenizer(source, setting="policy.tokenizer"))
    return TokenReading(shares_policy_tokens=shared, beginning=judge.beginning)


@dataclass(frozen=True)
class Likelihood:
    """score = sigmoid((mean log-prob per token - mean of the group) / scale); one engine call per chunk."""

    asker: Asker
    reading: TokenReading
    scale: float
    max_prefix_characters: int

    async def score(self, chunk: JudgedChunk, *, seed: int, count: CallCount) -> Scores:
        prompt, continuations = self._texts(chunk)
        scored = [place for place, continuation in enumerate(continuations) if continuation]
        if not scored:
            raise CriterionError("empty_candidate", "likelihood: no candidate of the chunk has a token to score")
        asked = [continuations[place] for place in scored]
        log_probs = await self.asker.call(lambda: self.asker.engine.score(prompt, asked), turn=chunk.turn)
        count.add_calls(1)
        means: list[float | None] = [None] * len(continuations)
        for place, row in zip(scored, log_probs, strict=True):
            means[place] = mean if math.isfinite(mean := fmean(row)) else None
        if not any(mean is not None for mean in means):
            raise CriterionError(
                "not_finite", f"likelihood: no log-prob of the chunk is finite, got {log_probs!r:.200}"
            )
        return Scores(scores_within_group(means, scale=self.scale))

    def _texts(self, chunk: JudgedChunk) -> tuple[Prompt, list[Prompt]]:
        """The prefix, and each candidate; empty where its text is. Token ids have an end token at least."""
        if self.reading.shares_policy_tokens:
            return list(chunk.prefix_token_ids), [candidate.token_ids for candidate in chunk.item.candidates]
        prefix = chunk.end_of_prefix(self.max_prefix_characters)
        if self.reading.beginning is not None:
            return [self.reading.beginning, *self.asker.engine.encode(prefix)], list(chunk.texts)
        if not prefix:
            raise CriterionError("empty_prefix", "likelihood: the prefix is empty and the judge's model has no BOS")
        return prefix, list(chunk.texts)


def scores_within_group(values: Sequence[float | None], *, scale: float) -> list[float | None]:
    """sigmoid((value - mean of the group) / scale): 0.5 for the mean, more for better ones. None stays None, outside
    the mean; at least one value is a number."""
    mean = fmean(value for value in values if value is not None)
    return [None if value is None else _sigmoid((value - mean) / scale) for value in values]


def _sigmoid(x: float) -> float:
    """Without overflow for large negative x."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
