"""HTTP clients of the three services. answers.py says what each answer means, replicas.py which replica is asked."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import httpx

from services.collector.answers import (
    Answer,
    AwayError,
    BugError,
    OddAnswerError,
    RefusedRequestError,
    check_judgements,
    check_rewrites,
    check_rollouts,
    error_of,
    read_answer,
    refusal,
    unavailable,
)
from services.collector.replicas import Replica, Replicas
from shared import metrics
from shared.api import (
    JudgementRequest,
    JudgementResponse,
    RewriteRequest,
    RewriteResponse,
    RolloutRequest,
    RolloutResponse,
)
from shared.errors import SettingsError, TokenIdsNeededError
from shared.http import authorization_header
from shared.metrics import EngineRole
from shared.records import Record
from shared.retries import Retries
from shared.settings import CollectorSettings, Settings

_log = logging.getLogger(__name__)

MakeJudgementRequest = Callable[[bool], JudgementRequest]
"""The same request with the policy's token ids (True) or without."""

_MAX_BUG_ANSWERS = 3
_MAX_ODD_ANSWERS = 8
"""While others are answered well. Half of the pods behind one address may be new ones for a minute."""
_CONNECT_TIMEOUT_S = 10.0


@dataclass
class _Series:
    """What the attempts of one request have met."""

    failed: set[Replica] = field(default_factory=set)
    """Replicas to try last."""
    num_bugs: int = 0
    num_odd: int = 0
    num_answered_before: int = 0
    """Requests of others that were answered well before the first odd answer."""


class ServiceClient:
    """One service, with one replica or several. Safe for concurrent requests."""

    def __init__(
        self, role: EngineRole, base_urls: Sequence[str], http: httpx.AsyncClient, settings: CollectorSettings
    ) -> None:
        for base_url in base_urls:
            if not base_url.startswith(("http://", "https://")):
                raise SettingsError(f"{role}.url is not an address such as http://127.0.0.1:8001")
        self.role = role
        self.replicas = Replicas(role, base_urls)
        self._http = http
        self._retries = Retries(
            max_wait_s=settings.max_backoff_s, max_attempts=settings.max_attempts, on_failure=self._count_retry
        )
        self._num_answered = 0
        """Requests that were answered well."""

    @property
    def trouble(self) -> str:
        """Why no replica answers; empty while one does."""
        replicas = self.replicas
        return "" if len(replicas.away) < len(replicas.all) else max(replicas.away, key=_newest).trouble

    async def post(
        self, path: str, request: Record, answer: type[Answer], *, document: str, fits: Callable[[Answer], None]
    ) -> Answer:
        """Waits while the service is down. `document` names what the request is about, `fits` raises ValueError if an
        answer has the wrong shape. Raises RefusedRequestError or SettingsError, for a judge also TokenIdsNeededError.
        """
        # Unset fields have their default: leaving them out keeps requests with many candidates short.
        body = request.model_dump_json(exclude_unset=True).encode()
        series = _Series()

        async def attempt() -> Answer:
            with self.replicas.place(document, after=series.failed) as replica:
                if replica is None:
                    raise AwayError(self.trouble)
                url = f"{replica.url}{path}"
                try:
                    found = read_answer(await self._post_once(url, body), answer, fits, said_by=f"{self.role} at {url}")
                except AwayError as exc:
                    self._note_failure(replica, exc, series)
                    raise
                except (RefusedRequestError, TokenIdsNeededError):
                    self._note_answer(replica)
                    raise
                self._num_answered += 1
                self._note_answer(replica)
                return found

        try:
            return await self._retries.wait_for(attempt)
        except AwayError as exc:
            detail = f"{exc} (after {self._retries.max_attempts} attempts, collector.max_attempts)"
            raise unavailable(self.role, detail) from exc

    async def _post_once(self, url: str, body: bytes) -> bytes:
        try:
            response = await self._http.post(url, content=body, headers={"Content-Type": "application/json"})
        except httpx.InvalidURL as exc:
            raise SettingsError(f"{self.role}.url {url!r} is not an address: {exc}") from exc
        except httpx.TransportError as exc:
            raise AwayError(f"{self.role} at {url}: {type(exc).__name__}: {exc}") from exc
        if response.status_code == 200:
            return response.content
        raise error_of(response, self.role, url)

    def _note_failure(self, replica: Replica, error: AwayError, series: _Series) -> None:
        """Raises SettingsError or RefusedRequestError where another attempt is in vain."""
        if isinstance(error, OddAnswerError) and not self._num_answered:
            asks = f"is {self.role}.url right, and the service of this collector's version?"
            raise SettingsError(f"{error}; {asks}") from error
        self._note_away(replica, error)
        series.failed.add(replica)
        if series.failed.issuperset(self.replicas.all):
            series.failed.clear()
        if isinstance(error, BugError):
            series.num_bugs += 1
        if isinstance(error, OddAnswerError):
            series.num_answered_before = series.num_answered_before if series.num_odd else self._num_answered
            series.num_odd += 1
        is_own_fault = series.num_odd >= _MAX_ODD_ANSWERS and self._num_answered > series.num_answered_before
        if series.num_bugs == _MAX_BUG_ANSWERS or is_own_fault:
            raise refusal(self.role, str(error)) from error

    def _note_away(self, replica: Replica, error: AwayError) -> None:
        """Logs once when a replica goes away, not at every retry."""
        if not replica.trouble:
            _log.warning("%s is down, retrying: %s", self._named(replica), error, extra={"service": self.role})
        self.replicas.note_failure(replica, str(error), rest_s=error.retry_after_s)
        metrics.service_up.labels(self.role).set(not self.trouble)

    def _note_answer(self, replica: Replica) -> None:
        if replica.trouble:
            _log.info("%s is back", self._named(replica), extra={"service": self.role})
        self.replicas.note_answer(replica)
        metrics.service_up.labels(self.role).set(1)

    def _named(self, replica: Replica) -> str:
        return self.role if len(self.replicas.all) == 1 else f"{self.role} replica {replica.name}"

    def _count_retry(self, _attempt: int, _error: BaseException) -> None:
        metrics.service_retries_total.labels(self.role).inc()


def _newest(replica: Replica) -> float:
    return replica.rests_until


class JudgeClient(ServiceClient):
    """Sends token ids only to a judge that wants them: they double the length of a request.

        request without ids --> 200, and `wants_token_ids` says how to send the next one
                            --> 428: the same request again with ids, and the following ones too

    So the collector need not know the judge's criteria, and a judge may be replaced during a run.
    """

    _wants_token_ids = False
    """As of its last answer on all criteria."""

    async def judge(self, make_request: MakeJudgementRequest, *, document: str) -> JudgementResponse:
        """Raises RefusedRequestError or SettingsError."""
        if not self._wants_token_ids:
            try:
                return await self._ask(make_request(False), document)
            except TokenIdsNeededError:
                self._wants_token_ids = True
        try:
            return await self._ask(make_request(True), document)
        except TokenIdsNeededError as exc:
            raise refusal(self.role, f"{exc} (they were there)") from exc

    async def _ask(self, request: JudgementRequest, document: str) -> JudgementResponse:
        fits = partial(check_judgements, request)
        answer = await self.post("/v1/judgements", request, JudgementResponse, document=document, fits=fits)
        if not request.criteria:
            self._wants_token_ids = answer.wants_token_ids
        return answer


@dataclass(frozen=True)
class Services:
    """Each request names its document, by which replicas.py picks the replica."""

    rollout: ServiceClient
    rewriter: ServiceClient
    judge: JudgeClient

    async def roll_out(self, request: RolloutRequest, *, document: str) -> RolloutResponse:
        fits = partial(check_rollouts, request)
        return await self.rollout.post("/v1/rollouts", request, RolloutResponse, document=document, fits=fits)

    async def rewrite(self, request: RewriteRequest, *, document: str) -> RewriteResponse:
        fits = partial(check_rewrites, request)
        return await self.rewriter.post("/v1/rewrites", request, RewriteResponse, document=document, fits=fits)

    @property
    def trouble(self) -> dict[str, str]:
        """By role, why its last request failed; services that answer, if by one replica alone, are absent."""
        return {client.role: client.trouble for client in self._clients if client.trouble}

    @property
    def lost_replicas(self) -> dict[str, str]:
        """Of services that others of their replicas answer for: in a few words, each with the whole sentence."""
        found = {}
        for client in self._clients:
            if client.replicas.away and not client.trouble:
                number = f"{len(client.replicas.away)} of {len(client.replicas.all)} {client.role} replicas"
                reasons = [f"{replica.name} is away: {replica.trouble}" for replica in client.replicas.away]
                found[f"{number} away"] = f"{number}: {'; '.join(reasons)}"
        return found

    @property
    def _clients(self) -> tuple[ServiceClient, ...]:
        return (self.rollout, self.rewriter, self.judge)


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
