"""What an OpenAI-compatible endpoint answers, as far as it is used: both routes' choices in one form.

    (choice,) = read_answer('{"choices": [{"message": {"content": "Verdict: A"}, "finish_reason": "stop"}]}')
    choice.text    # "Verdict: A"

A reasoning model's thoughts (`reasoning_content`) are left out: they are no part of the answer.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from shared.errors import EngineError


class _Part(BaseModel):
    """Endpoints add fields of their own."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _ListedToken(_Part):
    token: str
    logprob: float


class _ChatToken(_ListedToken):
    bytes: Sequence[int] | None = None
    top_logprobs: Any = None
    """Read where somebody asks: an answer has thousands of them, and reading all would block the event loop."""


_LISTED = TypeAdapter(Sequence[_ListedToken])


class _LogProbs(_Part):
    """`content` on the chat route, the others on /completions; there the first echoed token has no log-prob."""

    content: Sequence[_ChatToken] | None = None
    tokens: Sequence[str] | None = None
    token_logprobs: Sequence[float | None] | None = None
    top_logprobs: Sequence[Mapping[str, float] | None] | None = None
    text_offset: Sequence[int] | None = None


class _Message(_Part):
    content: str | None


class _Choice(_Part):
    index: int = 0
    finish_reason: str | None = None
    message: _Message | None = None
    text: str | None = None
    logprobs: _LogProbs | None = None


class _Answer(_Part):
    choices: Sequence[_Choice] = Field(min_length=1)


@dataclass(frozen=True)
class Place:
    """One token of an answer."""

    spelling: bytes
    own: Mapping[str, float]
    listed: Any

    @property
    def likely(self) -> Mapping[str, float]:
        """Log-probs (natural) of the tokens that are listed in its place, itself included, by text. EngineError if they
        are not listed as OpenAI's protocol has it."""
        listed = self.listed or []
        if isinstance(listed, Mapping):
            return {**self.own, **listed}
        try:
            return {**self.own, **{other.token: other.logprob for other in _LISTED.validate_python(listed)}}
        except ValidationError as exc:
            raise EngineError("an endpoint lists log-probs in a form that is not OpenAI's") from exc


@dataclass(frozen=True)
class Choice:
    index: int
    text: str
    finish_reason: str | None
    places: Sequence[Place]
    """Empty without log-probs. They may spell more than `text`: thoughts, special tokens."""
    log_probs: Sequence[float | None]
    """Of the tokens themselves."""
    offsets: Sequence[int]
    """/completions: where in the text each token begins, in characters; empty if that is not said."""


def read_answer(content: str) -> list[Choice]:
    """By index. Raises pydantic's ValidationError for anything else than an answer with choices."""
    answer = _Answer.model_validate_json(content)
    return sorted(map(_choice, answer.choices), key=lambda choice: choice.index)


def _choice(given: _Choice) -> Choice:
    text = (given.message.content if given.message else given.text) or ""
    found = given.logprobs or _LogProbs()
    places, log_probs = _chat_places(found) if found.content is not None else _plain_places(found)
    return Choice(given.index, text, given.finish_reason, places, log_probs, found.text_offset or ())


def _chat_places(found: _LogProbs) -> tuple[list[Place], list[float | None]]:
    tokens = found.content or ()
    places = [Place(_spelling(token), {token.token: token.logprob}, token.top_logprobs) for token in tokens]
    return places, [token.logprob for token in tokens]


def _spelling(token: _ChatToken) -> bytes:
    if token.bytes is None:
        return token.token.encode(errors="replace")
    return bytes(value & 255 for value in token.bytes)


def _plain_places(found: _LogProbs) -> tuple[list[Place], list[float | None]]:
    tokens, log_probs = found.tokens or (), list(found.token_logprobs or ())
    listed = found.top_logprobs or ()
    places = []
    for token, own, top in itertools.zip_longest(tokens, log_probs[: len(tokens)], listed[: len(tokens)]):
        places.append(Place(token.encode(errors="replace"), {} if own is None else {token: own}, top))
    return places, log_probs
