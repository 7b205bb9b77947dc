"""The likelihood criterion: how probable a candidate is, per token, under the judge's own model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from services.engine.base import Prompt
from services.judge.asker import Asker
from services.judge.criteria import CriterionError, JudgedChunk, Scores
from services.judge.engines import engine_settings
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
    engine = engine_settings(settings.judge, criterion)
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
        log_probs = await self.asker.call(lambda: self.asker.engine.score(prompt, continuations), turn=chunk.turn)
        count.add_calls(1)
        means = [fmean(row) for row in log_probs]
        if not all(math.isfinite(mean) for mean in means):
            raise CriterionError("not_finite", f"likelihood: log-probs per token must be finite, got {means}")
        return Scores(scores_within_group(means, scale=self.scale))

    def _texts(self, chunk: JudgedChunk) -> tuple[Prompt, list[Prompt]]:
        """The prefix, and each candidate."""
        if self.reading.shares_policy_tokens:
            return list(chunk.prefix_token_ids), [candidate.token_ids for candidate in chunk.item.candidates]
        if not all(chunk.texts):
            raise CriterionError("empty_candidate", "likelihood: an empty candidate has no tokens to score")
        prefix = chunk.end_of_prefix(self.max_prefix_characters)
        if self.reading.beginning is not None:
            return [self.reading.beginning, *self.asker.engine.encode(prefix)], list(chunk.texts)
        if not prefix:
            raise CriterionError("empty_prefix", "likelihood: the prefix is empty and the judge's model has no BOS")
        return prefix, list(chunk.texts)


def scores_within_group(values: Sequence[float], *, scale: float) -> list[float]:
    """sigmoid((value - mean of the group) / scale): 0.5 for the mean, more for better ones."""
    mean = fmean(values)
    return [_sigmoid((value - mean) / scale) for value in values]


def _sigmoid(x: float) -> float:
    """Without overflow for large negative x."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
