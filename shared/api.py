"""Requests and answers of the three services. In a run only the collector calls them.

One request has all chunks of one window, so that an engine prefills their common prefix once; answers keep its order.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from shared.metrics import ServiceRole
from shared.records import FinishReason, Judgement, Record, TokenIds

MAX_WINDOW_TOKENS = 1_000_000
MAX_SUFFIX_TOKENS = 8192
MAX_CHUNKS = 32_768
"""Of one window: 128k tokens in suffixes of 8, each of which may be three tokens shorter."""
MAX_ROLLOUTS = 128
MAX_REWRITES = 16
MAX_CANDIDATES = MAX_ROLLOUTS + MAX_REWRITES + 1
"""Of one chunk: rollouts, rewrites and the original."""
MAX_TEMPERATURE = 10.0
Text = Annotated[str, Field(max_length=12 * MAX_WINDOW_TOKENS)]
MaxSuffixTokens = Annotated[int, Field(ge=1, le=MAX_SUFFIX_TOKENS)]

TextFlaw = Literal["control_token", "broken_text", ""]
"""Why token ids have no equivalent text: a control token among them, or bytes that are no character."""


def _example(**request: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [request]})


class Span(Record):
    """The suffix of a chunk, `text[start:end]` of the request, in characters; its prefix is `text[:start]`."""

    start: int = Field(ge=0)
    end: int = Field(ge=0)


def _refuse_outside(spans: Sequence[Span], text: str) -> None:
    for span in spans:
        if not span.start <= span.end <= len(text):
            raise ValueError(f"items must lie in text[0:{len(text)}], got [{span.start}:{span.end}]")


class RolloutRequest(Record):
    """Ask the policy for `num_rollouts` continuations of each prefix `token_ids[:start]`."""

    model_config = _example(token_ids=[1, 52, 17, 98, 4], starts=[2, 4], num_rollouts=4, max_suffix_tokens=[128, 96])
    token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_WINDOW_TOKENS)]
    starts: Annotated[tuple[int, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    num_rollouts: int = Field(ge=1, le=MAX_ROLLOUTS)
    max_suffix_tokens: MaxSuffixTokens | tuple[MaxSuffixTokens, ...]
    """One bound for all starts, or one for each."""
    temperature: float = Field(default=1.0, ge=0.0, le=MAX_TEMPERATURE)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = Field(default=0, ge=0)
    """The same request with the same seed under the same weights gives the same rollouts."""

    @model_validator(mode="after")
    def _starts_lie_inside_and_have_bounds(self) -> "RolloutRequest":
        for start in self.starts:
            if not 1 <= start <= len(self.token_ids):
                raise ValueError(f"starts must lie in 1..{len(self.token_ids)} (len of token_ids), got {start}")
        if len(self.bounds) != len(self.starts):
            raise ValueError(f"max_suffix_tokens has {len(self.bounds)} bounds for {len(self.starts)} starts")
        return self

    @property
    def bounds(self) -> tuple[int, ...]:
        bounds = self.max_suffix_tokens
        return (bounds,) * len(self.starts) if isinstance(bounds, int) else bounds


class Rollout(Record):
    token_ids: TokenIds
    """As sampled; an end-of-text comes last."""
    text: str
    """The tokens decoded after their prefix, without an end-of-text and without half characters at either end."""
    finish_reason: FinishReason
    weight_version: int
    """The oldest weight version that any of its tokens was sampled under."""
    refusal: TextFlaw = ""
    """Why this rollout is no candidate (then `text` is empty); empty if it is one."""


class RolloutResponse(Record):
    rollouts: tuple[tuple[Rollout, ...], ...]
    """Per start, `num_rollouts` continuations."""


class RewriteItem(Span):
    max_suffix_tokens: MaxSuffixTokens
    """The rewrite is cut to this many of the policy's tokens."""
    begins_text: bool = False
    """At most a BOS comes before the suffix: tokenizers may split the first word of a text differently."""
    ends_document: bool = False
    """The suffix ends with an end-of-text, which is not in `text`; so does a rewrite that fits its bound."""


class RewriteRequest(Record):
    """Ask the rewriter for a better version of each suffix. The window's text is sent once for all chunks."""

    model_config = _example(
        text="The Moon moves around the Earth once in about 70 days.",
        items=[{"start": 25, "end": 54, "max_suffix_tokens": 128}],
    )
    text: Text
    items: Annotated[tuple[RewriteItem, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    num_rewrites: int = Field(default=1, ge=1, le=MAX_REWRITES)
    """Of each suffix."""
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _items_lie_inside(self) -> "RewriteRequest":
        _refuse_outside(self.items, self.text)
        return self

    def suffix(self, item: RewriteItem) -> str:
        return self.text[item.start : item.end]

    def end_of_prefix(self, item: RewriteItem, max_characters: int) -> str:
        return self.text[max(0, item.start - max_characters) : item.start]


RewriteRefusal = Literal[
    "empty", "overlong", "preamble", "refused", "repeats_prefix", "thought", "unanswerable"
]  # fmt: skip
"""As docs/api/rewriter.md explains them."""


class Rewrite(Record):
    """The rewriter's version of one suffix, or why there is none (then `text` is empty)."""

    text: str
    token_ids: TokenIds
    finish_reason: FinishReason
    refusal: RewriteRefusal | TextFlaw = ""
    """Why this rewrite is no candidate; empty if it is one."""


class RewriteResponse(Record):
    rewrites: tuple[tuple[Rewrite, ...], ...]
    """Per item, `num_rewrites` versions."""


class JudgedText(Record):
    """A candidate as the judge sees it, without its kinds."""

    text: Text
    token_ids: TokenIds = ()
    """In the policy's tokens; only if the request has those of the window."""


class JudgementItem(Span):
    """The candidates of one chunk. Factuality compares them with the original suffix."""

    candidates: Annotated[tuple[JudgedText, ...], Field(min_length=1, max_length=MAX_CANDIDATES)]
    """One alone has scores of criteria that look at each candidate by itself."""
    token_start: int | None = Field(default=None, ge=1)
    """In tokens: the prefix is `token_ids[:token_start]`."""


class JudgementRequest(Record):
    model_config = _example(
        text="The Moon moves around the Earth once in about 27 days.",
        items=[
            {"start": 25, "end": 54, "candidates": [{"text": " Earth in 27 days."}, {"text": " Earth Earth Earth."}]}
        ],
    )
    text: Text
    token_ids: Annotated[TokenIds, Field(max_length=MAX_WINDOW_TOKENS)] = ()
    """The window in the policy's tokens, for criteria that score tokens (`likelihood`): each answer says whether the
    judge wants them. With them every item needs `token_start` and every candidate `token_ids`."""
    items: Annotated[tuple[JudgementItem, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    criteria: tuple[str, ...] = ()
    """Only these of the judge's criteria; empty: all of them."""
    seed: int = Field(default=0, ge=0)
    """The same questions at the same seed get the verdicts that the judge still remembers."""

    @model_validator(mode="after")
    def _items_lie_inside(self) -> "JudgementRequest":
        _refuse_outside(self.items, self.text)
        return self

    @model_validator(mode="after")
    def _token_ids_are_there_for_all_or_none(self) -> "JudgementRequest":
        for item in self.items:
            with_ids = [bool(candidate.token_ids) for candidate in item.candidates]
            if not self.token_ids and (item.token_start is not None or any(with_ids)):
                raise ValueError("an item has token_start or token_ids, but the request has no token_ids of the window")
            if self.token_ids and not (item.token_start is not None and all(with_ids)):
                raise ValueError("with token_ids of the window each item needs token_start, each candidate token_ids")
            if self.token_ids and item.token_start is not None and item.token_start > len(self.token_ids):
                raise ValueError(f"token_start {item.token_start} lies beyond the {len(self.token_ids)} token_ids")
        return self


class JudgementFailure(Record):
    """A chunk that the judge could not score after all retries. Never a score."""

    reason: str
    num_calls: int = Field(ge=0)
    num_failures: int = Field(ge=0)


class JudgementResponse(Record):
    judgements: tuple[Judgement | JudgementFailure, ...]
    wants_token_ids: bool = False
    """The judge scores the policy's token ids; a request without them is answered 428."""


class Readiness(Record):
    """Answer of /readyz and /status (status 200 when ready, else 503)."""

    ready: bool
    service: ServiceRole
    engine: str = ""
    model: str = ""
    weight_version: int | None = None
    """Of new requests; rollout only."""
    fingerprint: str = ""
    """Judge only."""
    detail: str = ""
    """Why it isn't ready, or the last trouble. /readyz, which needs no token, gives a few words without addresses."""
