"""What a service's answer means for the collector: every status has one consequence. Called by clients.py.

connection error, timeout, 408 429 502 503 504   AwayError: retried with back-off, `max_attempts` times if set
401 403                                          wrong configuration: SettingsError, which stops the collector
413, 422 `InvalidRequest`                        the same: the next window would exceed the same limit
428 from the judge                               TokenIdsNeededError: JudgeClient sends the request again with token ids
4xx `RequestError`, `PromptError`                RefusedRequestError: this window can't be answered
500                                              BugError: retried twice, as the bug may depend on what else was in the
                                                 batch, then RefusedRequestError
all others                                       OddAnswerError: 404, a redirect, HTML, an answer of another shape, ...

A service that gives an odd answer before any good one is the wrong service: SettingsError. Later it is being replaced,
or something in front of it is: the request is retried without end. Only if others are answered well meanwhile, the
request itself is at fault, and refused.
"""

from collections.abc import Callable
from typing import TypeVar

import httpx
from pydantic import ValidationError

from shared.api import (
    JudgementFailure,
    JudgementRequest,
    JudgementResponse,
    RewriteRequest,
    RewriteResponse,
    RolloutRequest,
    RolloutResponse,
)
from shared.errors import ServiceError, SettingsError, TokenIdsNeededError
from shared.metrics import EngineRole
from shared.records import Record

Answer = TypeVar("Answer", bound=Record)

_PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})
_REFUSALS = frozenset({"RequestError", "PromptError"})
_MAX_RETRY_AFTER_S = 300.0
_SMALLER = "lower chunks.context_tokens or the schedule's num_rollouts"
_REASONS: dict[EngineRole, str] = {"rollout": "rollout", "rewriter": "rewrite", "judge": "judge"}


class RefusedRequestError(ServiceError):
    """A service will not answer this request; `reason` is what the ledger counts it under."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message, retryable=False)
        self.reason = reason


class AwayError(ServiceError):
    """One attempt failed; another may succeed."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message, retryable=True)
        self.retry_after_s = retry_after_s


class BugError(AwayError):
    """Status 500."""


class OddAnswerError(AwayError):
    """No answer of the service that this collector knows."""


def refusal(role: EngineRole, message: str) -> RefusedRequestError:
    return RefusedRequestError(message, reason=f"{_REASONS[role]}_refused")


def unavailable(role: EngineRole, message: str) -> RefusedRequestError:
    return RefusedRequestError(message, reason=f"{_REASONS[role]}_unavailable")


def error_of(response: httpx.Response, role: EngineRole, url: str) -> Exception:
    """What an answer with a status other than 200 raises."""
    status, (kind, message) = response.status_code, _error_in(response)
    said = f"{role} at {url} answered {status}: {message}"
    if status in (401, 403):
        return SettingsError(f"{said}; set HEADWATER_TOKEN to the token that the service was started with")
    if status == 413:
        return SettingsError(f"{said}; raise {role}.max_request_bytes there, or {_SMALLER}")
    if status == 422 and kind == "InvalidRequest":
        return SettingsError(f"{said}; is it of this collector's version? A window may be too large: {_SMALLER}")
    if status == TokenIdsNeededError.status and role == "judge":
        return TokenIdsNeededError(said)
    if status in _PASSING_STATUSES:
        return AwayError(said, retry_after_s=_retry_after_s(response))
    if 400 <= status < 500 and kind in _REFUSALS:
        return refusal(role, said)
    return BugError(said) if status == 500 else OddAnswerError(said)


def read_answer(content: bytes, answer: type[Answer], fits: Callable[[Answer], None], *, said_by: str) -> Answer:
    """Raises OddAnswerError for what is no `answer`, or one that `fits` raises ValueError about."""
    try:
        found = answer.model_validate_json(content)
        fits(found)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        wrong = f"not a {answer.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise OddAnswerError(f"{said_by} answered something that is {wrong}") from exc
    except ValueError as exc:
        raise OddAnswerError(f"{said_by} answered {exc}") from exc
    return found


def check_rollouts(request: RolloutRequest, answer: RolloutResponse) -> None:
    """This and the following raise ValueError if the shape of the answer is not that of the request."""
    _expect("chunks", len(answer.rollouts), len(request.starts))
    for group in answer.rollouts:
        _expect("rollouts of a chunk", len(group), request.num_rollouts)


def check_rewrites(request: RewriteRequest, answer: RewriteResponse) -> None:
    _expect("chunks", len(answer.rewrites), len(request.items))
    for group in answer.rewrites:
        _expect("rewrites of a chunk", len(group), request.num_rewrites)


def check_judgements(request: JudgementRequest, answer: JudgementResponse) -> None:
    _expect("verdicts", len(answer.judgements), len(request.items))
    for item, verdict in zip(request.items, answer.judgements, strict=True):
        if isinstance(verdict, JudgementFailure):
            continue
        num_candidates = len(item.candidates)
        for name, scores in [("rewards", verdict.rewards), *verdict.scores.items()]:
            _expect(name, len(scores), num_candidates)
        if any(place >= num_candidates for place in verdict.barred):
            raise ValueError(f"barred {list(verdict.barred)}, expected places among {num_candidates} candidates")


def _expect(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"{found} {what}, expected {expected}")


def _error_in(response: httpx.Response) -> tuple[str, str]:
    """Type and message of an error in our services' form; else an empty type and the beginning of the body."""
    try:
        error = response.json()["error"]
        return str(error.get("type", "")), str(error["message"])[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", response.text[:200]


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds only; a date would need clocks that agree."""
    try:
        return min(max(0.0, float(response.headers.get("Retry-After", "0"))), _MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0
