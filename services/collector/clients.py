"""HTTP clients of the three services. Every status has one consequence:

connection error, timeout, 408 429 502 503 504   retried with back-off, without end unless max_attempts is set
401 403 404 405                                  wrong configuration: SettingsError, which stops the collector
413, 422 `InvalidRequest`                        the same: the next window would exceed the same limit
428 from the judge                               TokenIdsNeededError: JudgeClient sends the request again with token ids
500                                              retried twice: the bug may depend on what else was in the batch
other 4xx, unreadable answers                    RefusedRequestError: this window is dropped and counted
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx
from pydantic import ValidationError

from shared import metrics
from shared.api import (
    JudgementRequest,
    JudgementResponse,
    RewriteRequest,
    RewriteResponse,
    RolloutRequest,
    RolloutResponse,
)
from shared.errors import ServiceError, SettingsError, TokenIdsNeededError
from shared.http import authorization_header
from shared.metrics import EngineRole
from shared.records import Record
from shared.retries import Retries
from shared.settings import CollectorSettings, Settings

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer", bound=Record)
MakeJudgementRequest = Callable[[bool], JudgementRequest]
"""The same request with the policy's token ids (True) or without."""

_PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})
_MAX_BUG_ANSWERS = 3
_MAX_RETRY_AFTER_S = 300.0
_CONNECT_TIMEOUT_S = 10.0
_SMALLER = "lower chunks.context_tokens or the schedule's num_rollouts"
_REASONS: dict[EngineRole, str] = {"rollout": "rollout", "rewriter": "rewrite", "judge": "judge"}


class RefusedRequestError(ServiceError):
    """A service will not answer this request; `reason` is what the ledger counts it under."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message, retryable=False)
        self.reason = reason


class _UnavailableError(ServiceError):
    """One attempt failed; another may succeed."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message, retryable=True)
        self.retry_after_s = retry_after_s


class _BugError(_UnavailableError):
    """Status 500."""


class ServiceClient:
    """One service, with one replica or several. Safe for concurrent requests."""

    def __init__(
        self, role: EngineRole, base_urls: Sequence[str], http: httpx.AsyncClient, settings: CollectorSettings
    ) -> None:
        for base_url in base_urls:
            if not base_url.startswith(("http://", "https://")):
                raise SettingsError(f"{role}.url is not an address such as http://127.0.0.1:8001")
        self.role = role
        # Every attempt goes to the next replica, so a retry reaches another one.
        self._in_turn = itertools.cycle([base_url.rstrip("/") for base_url in base_urls])
        self._http = http
        self._retries = Retries(
            max_wait_s=settings.max_backoff_s, max_attempts=settings.max_attempts, on_failure=self._count_retry
        )
        self.trouble = ""  # why the last attempt failed; empty when it succeeded

    async def post(self, path: str, request: Record, answer: type[Answer]) -> Answer:
        """Waits while the service is down. Raises RefusedRequestError or SettingsError, for a judge also
        TokenIdsNeededError."""
        # Unset fields have their default: leaving them out keeps requests with many candidates short.
        body = request.model_dump_json(exclude_unset=True).encode()
        bugs = itertools.count(1)

        async def attempt() -> Answer:
            url = f"{next(self._in_turn)}{path}"
            try:
                content = await self._post_once(url, body)
            except _UnavailableError as exc:
                self._note_down(str(exc))
                if isinstance(exc, _BugError) and next(bugs) == _MAX_BUG_ANSWERS:
                    raise self._refusal(str(exc)) from exc
                raise
            if self.trouble:
                _log.info("%s is back", self.role, extra={"service": self.role})
            self.trouble = ""
            metrics.service_up.labels(self.role).set(1)
            return self._read(content, answer, url)

        try:
            return await self._retries.wait_for(attempt)
        except _UnavailableError as exc:
            detail = f"{exc} (after {self._retries.max_attempts} attempts, collector.max_attempts)"
            raise RefusedRequestError(detail, reason=f"{_REASONS[self.role]}_unavailable") from exc

    async def _post_once(self, url: str, body: bytes) -> bytes:
        try:
            response = await self._http.post(url, content=body, headers={"Content-Type": "application/json"})
        except httpx.InvalidURL as exc:
            raise SettingsError(f"{self.role}.url {url!r} is not an address: {exc}") from exc
        except httpx.TransportError as exc:
            raise _UnavailableError(f"{self.role} at {url}: {type(exc).__name__}: {exc}") from exc
        if response.status_code == 200:
            return response.content
        raise self._error(response, url)

    def _error(self, response: httpx.Response, url: str) -> Exception:
        status, (kind, message) = response.status_code, _error_in(response)
        said = f"{self.role} at {url} answered {status}: {message}"
        if status in (401, 403):
            return SettingsError(f"{said}; set HEADWATER_TOKEN to the token that the service was started with")
        if status in (404, 405):
            return SettingsError(f"{said}; is {self.role}.url right?")
        if status == 413:
            return SettingsError(f"{said}; raise {self.role}.max_request_bytes there, or {_SMALLER}")
        if status == 422 and kind == "InvalidRequest":
            return SettingsError(f"{said}; is it of this collector's version? A window may be too large: {_SMALLER}")
        if status == TokenIdsNeededError.status and self.role == "judge":
            return TokenIdsNeededError(said)
        if status in _PASSING_STATUSES:
            return _UnavailableError(said, retry_after_s=_retry_after_s(response))
        if status == 500:
            return _BugError(said)
        return self._refusal(said)

    def _read(self, content: bytes, answer: type[Answer], url: str) -> Answer:
        try:
            return answer.model_validate_json(content)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            wrong = f"not a {answer.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise self._refusal(f"{self.role} at {url} answered something that is {wrong}") from exc

    def _refusal(self, message: str) -> RefusedRequestError:
        return RefusedRequestError(message, reason=f"{_REASONS[self.role]}_refused")

    def _count_retry(self, _attempt: int, _error: BaseException) -> None:
        metrics.service_retries_total.labels(self.role).inc()

    def _note_down(self, trouble: str) -> None:
        """Logs once when the service goes down, not at every retry."""
        if not self.trouble:
            _log.warning("%s is down, retrying: %s", self.role, trouble, extra={"service": self.role})
        self.trouble = trouble
        metrics.service_up.labels(self.role).set(0)


class JudgeClient(ServiceClient):
    """Sends token ids only to a judge that wants them: they double the length of a request.

        request without ids --> 200, and `wants_token_ids` says how to send the next one
                            --> 428: the same request again with ids, and the following ones too

    So the collector need not know the judge's criteria, and a judge may be replaced during a run.
    """

    _wants_token_ids = False
    """As of its last answer."""

    async def judge(self, make_request: MakeJudgementRequest) -> JudgementResponse:
        """Raises RefusedRequestError or SettingsError."""
        if not self._wants_token_ids:
            try:
                return await self._ask(make_request(False))
            except TokenIdsNeededError:
                self._wants_token_ids = True
        try:
            return await self._ask(make_request(True))
        except TokenIdsNeededError as exc:
            raise self._refusal(f"{exc} (they were there)") from exc

    async def _ask(self, request: JudgementRequest) -> JudgementResponse:
        answer = await self.post("/v1/judgements", request, JudgementResponse)
        self._wants_token_ids = answer.wants_token_ids
        return answer


@dataclass(frozen=True)
class Services:
    rollout: ServiceClient
    rewriter: ServiceClient
    judge: JudgeClient

    async def roll_out(self, request: RolloutRequest) -> RolloutResponse:
        return await self.rollout.post("/v1/rollouts", request, RolloutResponse)

    async def rewrite(self, request: RewriteRequest) -> RewriteResponse:
        return await self.rewriter.post("/v1/rewrites", request, RewriteResponse)

    @property
    def trouble(self) -> dict[str, str]:
        """By role, why its last request failed; services that are up are absent."""
        clients = (self.rollout, self.rewriter, self.judge)
        return {client.role: client.trouble for client in clients if client.trouble}


def http_client(
    settings: Settings, *, token: str, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """One connection pool for all services; every wait is bounded by collector.request_timeout_s."""
    timeout_s = settings.collector.request_timeout_s
    connections = 3 * settings.collector.max_windows_in_flight
    return httpx.AsyncClient(
        headers=authorization_header(token),
        timeout=httpx.Timeout(timeout_s, connect=min(_CONNECT_TIMEOUT_S, timeout_s)),
        # One connection per request: replicas behind one name share the load, and an idle connection that the service
        # has closed never looks like a service that is down.
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        transport=transport,
        trust_env=False,
    )


def build_services(settings: Settings, http: httpx.AsyncClient) -> Services:
    return Services(
        rollout=ServiceClient("rollout", settings.rollout.base_urls, http, settings.collector),
        rewriter=ServiceClient("rewriter", settings.rewriter.base_urls, http, settings.collector),
        judge=JudgeClient("judge", settings.judge.base_urls, http, settings.collector),
    )


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
