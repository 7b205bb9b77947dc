"""Builds answers in the form of OpenAI's completions. Called by completions.py, in a thread: an answer may have a
million tokens, each with its text and log-prob.
"""

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.engine.base import Engine, Generation, TokenScore
from services.rollout.openai_models import Choice, ChoiceLogprobs, CompletionRequest, CompletionResponse, Usage

Scored = tuple[list[TokenScore | None], int]
"""Scores of the tokens that a choice shows, and the weight version that they were computed under."""


@dataclass(frozen=True)
class Sample:
    """One continuation of one prompt."""

    prompt: tuple[int, ...]
    prompt_text: str
    answer: Generation


class TokenTexts:
    """The text of each token by itself. The tokenizer never changes while weights do, so each is decoded once.

    Safe from several threads: at worst two decode the same token.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._table: dict[int, str] = {}

    def of(self, token_ids: Sequence[int]) -> list[str]:
        for token_id in set(token_ids) - self._table.keys():
            self._table[token_id] = self._engine.decode([token_id])
        return [self._table[token_id] for token_id in token_ids]


def render(
    request: CompletionRequest,
    samples: Sequence[Sample],
    scored: Sequence[Scored],
    *,
    texts: TokenTexts,
    num_prompt_tokens: int,
) -> str:
    """The whole answer as JSON."""
    num_sampled = sum(len(sample.answer.token_ids) for sample in samples)
    answer = CompletionResponse(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        choices=[],
        usage=Usage(
            prompt_tokens=num_prompt_tokens,
            completion_tokens=num_sampled,
            total_tokens=num_prompt_tokens + num_sampled,
        ),
        policy_version=min(
            [sample.answer.weight_version for sample in samples] + [version for scores, version in scored if scores]
        ),
    )
    # Choice by choice: pydantic lets no other thread run while it writes a record, the event loop's included.
    choices = [
        _choice(request, index, sample, scores, texts).model_dump_json()
        for index, (sample, (scores, _)) in enumerate(zip(samples, scored, strict=True))
    ]
    frame = answer.model_dump_json(exclude={"choices"})
    return f'{frame[:-1]},"choices":[{",".join(choices)}]}}'


def _choice(
    request: CompletionRequest,
    index: int,
    sample: Sample,
    scores: Sequence[TokenScore | None],
    texts: TokenTexts,
) -> Choice:
    answer = sample.answer
    text, stopped = _cut(answer.text, request.stops)
    shown = sample.prompt + answer.token_ids if request.echo else answer.token_ids
    whole = (sample.prompt_text if request.echo else "") + text
    return Choice(
        index=index,
        text=whole,
        finish_reason="stop" if stopped else answer.finish_reason,
        logprobs=None
        if request.logprobs is None
        else _logprobs(shown, scores, texts, max_characters=len(whole) if stopped else None, top=request.logprobs),
    )


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _logprobs(
    token_ids: Sequence[int],
    scores: Sequence[TokenScore | None],
    texts: TokenTexts,
    *,
    max_characters: int | None,
    top: int,
) -> ChoiceLogprobs:
    """Tokens that begin at or behind `max_characters` (a stop string) are left out."""
    tokens = texts.of(token_ids)
    offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=0))[: len(tokens)]
    kept = len([offset for offset in offsets if max_characters is None or offset < max_characters])
    return ChoiceLogprobs(
        tokens=tokens[:kept],
        token_logprobs=[score.log_prob if score else None for score in scores[:kept]],
        top_logprobs=_tops(tokens[:kept], scores[:kept], texts) if top else None,
        text_offset=offsets[:kept],
    )


def _tops(
    tokens: Sequence[str], scores: Sequence[TokenScore | None], texts: TokenTexts
) -> list[dict[str, float] | None]:
    """The most probable token, and the given one beside it where that is another."""
    likeliest = iter(texts.of([score.best_token_id for score in scores if score]))
    return [
        {token: score.log_prob} | {next(likeliest): score.best_log_prob} if score else None
        for token, score in zip(tokens, scores, strict=True)
    ]
