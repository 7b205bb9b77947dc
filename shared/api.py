"""Request and response models of the three services. The collector is their only caller in a run.

Requests are document-major: one request carries every chunk of one document window, so that an engine
prefills the shared prefix once. Answers keep the order of the request.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from shared.records import FinishReason, Judgement, Record, TokenIds

MAX_CHUNKS = 1024
MAX_CANDIDATES = 128
Text = Annotated[str, Field(max_length=4_000_000)]


class RolloutRequest(Record):
    """Ask the policy for `num_rollouts` continuations of each prefix `token_ids[:start]`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "token_ids": [1, 52, 17, 98, 4],
                    "starts": [2, 4],
                    "num_rollouts": 4,
                    "max_suffix_tokens": 128,
                }
            ]
        }
    )
    token_ids: Annotated[TokenIds, Field(min_length=1, max_length=1_000_000)]
    starts: Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    num_rollouts: int = Field(ge=1, le=MAX_CANDIDATES)
    max_suffix_tokens: int = Field(ge=1, le=8192)
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0)
    """The same request with the same seed under the same weights gives the same rollouts."""

    @model_validator(mode="after")
    def _starts_lie_inside(self) -> "RolloutRequest":
        for start in self.starts:
            if not 1 <= start <= len(self.token_ids):
                raise ValueError(f"starts must lie in 1..{len(self.token_ids)} (len of token_ids), got {start}")
        return self


class Rollout(Record):
    """One continuation sampled by the policy."""

    token_ids: TokenIds
    text: str
    finish_reason: FinishReason
    policy_version: int
    """The oldest weight version that any of its tokens was sampled under."""


class RolloutResponse(Record):
    """Per start, `num_rollouts` continuations."""

    rollouts: tuple[tuple[Rollout, ...], ...]


class RewriteItem(Record):
    """One chunk to rewrite."""

    prefix: Text
    """Raw text before the suffix."""
    suffix: Text
    max_suffix_tokens: int = Field(ge=1, le=8192)
    """The rewrite is cut to this many of the policy's tokens."""


class RewriteRequest(Record):
    """Ask the teacher for a better version of each suffix."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "prefix": "The Moon moves around the",
                            "suffix": " Earth once in about 70 days.",
                            "max_suffix_tokens": 128,
                        }
                    ]
                }
            ]
        }
    )
    items: Annotated[tuple[RewriteItem, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    seed: int = Field(default=0, ge=0)


class Rewrite(Record):
    """The teacher's version of one suffix, or why there is none (then `text` is empty)."""

    text: str
    token_ids: TokenIds
    finish_reason: FinishReason
    refusal: Literal["empty", "refused", "overlong", ""] = ""
    """Why this rewrite must not be used as a candidate; empty when it may."""


class RewriteResponse(Record):
    rewrites: tuple[Rewrite, ...]


class JudgedText(Record):
    """A candidate as the judge sees it: the kind is withheld on purpose."""

    text: Text
    token_ids: TokenIds = ()
    """The policy's tokens, for criteria that score tokens (`likelihood`) under the same tokenizer."""


class JudgementItem(Record):
    """The candidates of one chunk."""

    prefix: Text
    candidates: Annotated[tuple[JudgedText, ...], Field(min_length=2, max_length=MAX_CANDIDATES + 2)]
    """Rollouts, and beside them the original and its rewrite."""
    reference: Text
    """The original suffix: what factuality is held against."""
    prefix_token_ids: TokenIds = ()


class JudgementRequest(Record):
    """Ask for scores of the candidates of each chunk."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {
                            "prefix": "The Moon moves around the",
                            "candidates": [{"text": " Earth in 27 days."}, {"text": " Earth Earth Earth."}],
                            "reference": " Earth once in about 27 days.",
                        }
                    ]
                }
            ]
        }
    )
    items: Annotated[tuple[JudgementItem, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    seed: int = Field(default=0, ge=0)


class JudgementFailure(Record):
    """A chunk that the judge could not score after all retries. Never a score."""

    reason: str
    num_calls: int = Field(ge=0)
    num_failures: int = Field(ge=0)


class JudgementResponse(Record):
    judgements: tuple[Judgement | JudgementFailure, ...]


class Readiness(Record):
    """Answer of /readyz and /status (status 200 when ready, else 503)."""

    ready: bool
    service: Literal["rollout", "rewriter", "judge", "collector"]
    engine: str = ""
    model: str = ""
    policy_version: int | None = None
    """Rollout only: the weight version that new requests are answered under."""
    fingerprint: str = ""
    """Judge only."""
    detail: str = ""
    """Why it isn't ready, or the last trouble (such as a refused weight update). /readyz, which is open, has it in a
    few words, without addresses and the errors of others; /status, behind the token, in full."""
