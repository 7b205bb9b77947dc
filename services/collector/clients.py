"""HTTP clients of the three services. Every status has one consequence:

connection error, timeout, 408 429 502 503 504   retried with back-off, without end unless max_attempts is set
401 403 404 405                                  wrong configuration: SettingsError, which stops the collector
413, 422 `InvalidRequest`                        the same: the next window would exceed the same limit
428 from the judge                               TokenIdsNeededError: JudgeClient sends the request again with token ids
500                                              retried twice: the bug may depend on what else was in the batch
other 4xx, unreadable answers                    RefusedRequestError: this window is dropped and counted
"""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import httpx
from pydantic import ValidationError

from services.collector.backoff import Backoff
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
from shared.records import Record
from shared.settings import Settings

_log = logging.getLogger(__name__)

Role = Literal["rollout", "rewriter", "judge"]
Answer = TypeVar("Answer", bound=Record)

_PASSING_STATUSES = frozenset({408, 429, 502, 503, 504})
_CONFIGURATION_STATUSES = frozenset({401, 403, 404, 405})
_MAX_BUG_ANSWERS = 3
_MAX_RETRY_AFTER_S = 300.0
_CONNECT_TIMEOUT_S = 10.0
_SMALLER = "lower chunks.context_tokens or the schedule's num_rollouts"
_REASONS: dict[Role, str] = {"rollout": "rollout", "rewriter": "rewrite", "judge": "judge"}


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
        self, role: Role, base_urls: Sequence[str], http: httpx.AsyncClient, *, max_backoff_s: float, max_attempts: int
    ) -> None:
        for base_url in base_urls:
            if not base_url.startswith(("http://", "https://")):
                raise SettingsError(f"{role}.url is not an address: expected http://HOST:PORT")
        self.role = role
        self._in_turn = itertools.cycle([base_url.rstrip("/") for base_url in base_urls])
        """Replicas: every attempt goes to the next one, so a retry reaches another replica."""
        self._http = http
        self._max_backoff_s = max_backoff_s
        self._max_attempts = max_attempts
        self.trouble = ""
        """Why the last attempt failed; empty when it succeeded."""

    async def post(self, path: str, request: Record, answer: type[Answer]) -> Answer:
        """The service's answer, however long it is down. Raises RefusedRequestError or SettingsError; from a judge also
        TokenIdsNeededError."""
        # Unset fields have their default: leaving them out keeps requests with many candidates short.
        body = request.model_dump_json(exclude_unset=True).encode()
        backoff, attempt, bugs = Backoff(self._max_backoff_s), 0, 0
        while True:
            attempt += 1
            url = f"{next(self._in_turn)}{path}"
            try:
                content = await self._post_once(url, body)
                self._note_up()
                return self._read(content, answer, url)
            except _UnavailableError as exc:
                self._note_down(str(exc))
                bugs += isinstance(exc, _BugError)
                if bugs >= _MAX_BUG_ANSWERS:
                    raise RefusedRequestError(str(exc), reason=f"{_REASONS[self.role]}_refused") from exc
                if attempt == self._max_attempts:
                    detail = f"{exc} (after {attempt} attempts, collector.max_attempts)"
                    raise RefusedRequestError(detail, reason=f"{_REASONS[self.role]}_unavailable") from exc
                wait_s = backoff.next_s(at_least_s=exc.retry_after_s)
            metrics.service_retries_total.labels(self.role).inc()
            await asyncio.sleep(wait_s)

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
        said = f"{self.role} at {url} answered {response.status_code}: {_message(response)}"
        if response.status_code in _CONFIGURATION_STATUSES:
            remedy = "set HEADWATER_TOKEN to the token that the service was started with"
            if response.status_code in (404, 405):
                remedy = f"is {self.role}.url right?"
            return SettingsError(f"{said}; {remedy}")
        if response.status_code == 413:
            return SettingsError(f"{said}; raise {self.role}.max_request_bytes there, or {_SMALLER}")
        if response.status_code == 422 and _error_type(response) == "InvalidRequest":
            return SettingsError(f"{said}; is it of this collector's version? A window may be too large: {_SMALLER}")
        if response.status_code == TokenIdsNeededError.status and self.role == "judge":
            return TokenIdsNeededError(said)
        if response.status_code in _PASSING_STATUSES:
            return _UnavailableError(said, retry_after_s=_retry_after_s(response))
        if response.status_code == 500:
            return _BugError(said)
        return RefusedRequestError(said, reason=f"{_REASONS[self.role]}_refused")

    def _read(self, content: bytes, answer: type[Answer], url: str) -> Answer:
        try:
            return answer.model_validate_json(content)
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(piece) for piece in first["loc"])
            raise RefusedRequestError(
                f"{self.role} at {url} answered something that is not a {answer.__name__}: {place}: {first['msg']}",
                reason=f"{_REASONS[self.role]}_refused",
            ) from exc

    def _note_up(self) -> None:
        if self.trouble:
            _log.info("%s is back", self.role, extra={"service": self.role})
        self.trouble = ""
        metrics.service_up.labels(self.role).set(1)

    def _note_down(self, trouble: str) -> None:
        """Logs once when the service goes down, not at every retry."""
        if not self.trouble:
            _log.warning("%s is down, retrying: %s", self.role, trouble, extra={"service": self.role})
        self.trouble = trouble
        metrics.service_up.labels(self.role).set(0)


class MakeJudgementRequest(Protocol):
    """The same request, with the policy's token ids or without."""

    def __call__(self, *, with_token_ids: bool) -> JudgementRequest: ...


class JudgeClient:
    """Sends token ids only to a judge that wants them: they double the length of a request.

        request without ids --> 200, and `wants_token_ids` says how to send the next one
                            --> 428: the same request again with ids, and the following ones too

    So the collector need not know the judge's criteria, and a judge may be replaced during a run.
    """

    def __init__(self, client: ServiceClient) -> None:
        self.role = client.role
        self._client = client
        self._wants_token_ids = False
        """As of its last answer."""

    @property
    def trouble(self) -> str:
        return self._client.trouble

    async def judge(self, make_request: MakeJudgementRequest) -> JudgementResponse:
        """Raises RefusedRequestError or SettingsError."""
        if not self._wants_token_ids:
            try:
                return await self._post(make_request(with_token_ids=False))
            except TokenIdsNeededError:
                self._wants_token_ids = True
        try:
            return await self._post(make_request(with_token_ids=True))
        except TokenIdsNeededError as exc:
            raise RefusedRequestError(f"{exc} (they were there)", reason="judge_refused") from exc

    async def _post(self, request: JudgementRequest) -> JudgementResponse:
        answer = await self._client.post("/v1/judgements", request, JudgementResponse)
        self._wants_token_ids = answer.wants_token_ids
        return answer


@dataclass(frozen=True)
class Services:
    """The three, by their verbs."""

    rollout: ServiceClient
    rewriter: ServiceClient
    judge: JudgeClient

    async def roll_out(self, request: RolloutRequest) -> RolloutResponse:
        return await self.rollout.post("/v1/rollouts", request, RolloutResponse)

    async def rewrite(self, request: RewriteRequest) -> RewriteResponse:
        return await self.rewriter.post("/v1/rewrites", request, RewriteResponse)

    async def judge_candidates(self, make_request: MakeJudgementRequest) -> JudgementResponse:
        return await self.judge.judge(make_request)

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
        # One connection per request: replicas behind one name then share the load, and an idle connection that the
        # service has closed never looks like a service that is down. Next to a model's time the cost is nothing.
        limits=httpx.Limits(max_connections=connections, max_keepalive_connections=0),
        transport=transport,
        trust_env=False,
    )


def build_services(settings: Settings, http: httpx.AsyncClient) -> Services:
    """Clients for the addresses in the settings."""

    def client(role: Role, base_urls: Sequence[str]) -> ServiceClient:
        collector = settings.collector
        return ServiceClient(
            role, base_urls, http, max_backoff_s=collector.max_backoff_s, max_attempts=collector.max_attempts
        )

    return Services(
        rollout=client("rollout", settings.rollout.base_urls),
        rewriter=client("rewriter", settings.rewriter.base_urls),
        judge=JudgeClient(client("judge", settings.judge.base_urls)),
    )


def _message(response: httpx.Response) -> str:
    """The error's text in our own services' form, else the beginning of the body."""
    try:
        body = response.json()
        return str(body["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def _error_type(response: httpx.Response) -> str:
    """Our own services' word for the error; empty for an answer of another form."""
    try:
        return str(response.json()["error"]["type"])
    except (ValueError, KeyError, TypeError):
        return ""


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds only; a date would need clocks that agree."""
    try:
        return min(max(0.0, float(response.headers.get("Retry-After", "0"))), _MAX_RETRY_AFTER_S)
    except ValueError:
        return 0.0
