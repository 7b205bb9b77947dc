"""Statuses, retries and their limits, at the HTTP transport's seam."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from services.collector.answers import RefusedRequestError
from services.collector.clients import build_services, http_client
from shared.api import RolloutRequest, RolloutResponse
from shared.errors import SettingsError
from shared.settings import Settings

REQUEST = RolloutRequest(token_ids=(1, 2), starts=(1,), num_rollouts=1, max_suffix_tokens=4)
ANSWER = {"rollouts": [[{"token_ids": [3], "text": "x", "finish_reason": "stop", "weight_version": 0}]]}

Answers = list[httpx.Response | Exception]


def good() -> httpx.Response:
    return httpx.Response(200, json=ANSWER)


def post(handle: Callable[[httpx.Request], httpx.Response], num_requests: int = 1, **sections: Any) -> RolloutResponse:
    """The last answer of a rollout service whose wire is `handle`."""
    collector = {"max_backoff_s": 0.01} | sections.pop("collector", {})
    settings = Settings.model_validate({"rollout": {"url": "http://rollout.test"}, "collector": collector} | sections)

    async def run() -> RolloutResponse:
        async with http_client(settings, token="word", transport=httpx.MockTransport(handle)) as http:
            services = build_services(settings, http)
            return [await services.roll_out(REQUEST, document="0.0.0") for _ in range(num_requests)][-1]

    return asyncio.run(run())


def ask(answers: Answers, **sections: Any) -> tuple[RolloutResponse, int]:
    """The service's answer when the wire answers these one after another, and how often it was asked."""
    left = list(answers)

    def handle(_request: httpx.Request) -> httpx.Response:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return post(handle, **sections), len(answers) - len(left)


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: httpx.Response(503, json={"error": {"type": "OverloadedError", "message": "full"}}),
        lambda: httpx.Response(429),
        lambda: httpx.Response(408),
        lambda: httpx.Response(502, text="<html>bad gateway</html>"),
        lambda: httpx.Response(504),
        lambda: httpx.ConnectError("refused"),
        lambda: httpx.ReadTimeout("slow"),
        lambda: httpx.RemoteProtocolError("cut off"),
    ],
)
def test_what_may_pass_is_tried_again(trouble: Callable[[], httpx.Response | Exception]) -> None:
    answer, asked = ask([trouble() for _ in range(4)] + [good()])
    assert answer.rollouts[0][0].token_ids == (3,)
    assert asked == 5


def test_a_bug_of_the_service_is_tried_three_times() -> None:
    assert ask([httpx.Response(500), httpx.Response(500), good()])[1] == 3
    with pytest.raises(RefusedRequestError) as caught:
        ask([httpx.Response(500)] * 3)
    assert caught.value.reason == "rollout_refused"


@pytest.mark.parametrize("status", [400, 409, 422])
def test_a_refused_request_is_not_repeated(status: int) -> None:
    body = {"error": {"type": "RequestError", "message": "too many tokens"}}
    with pytest.raises(RefusedRequestError, match=f"answered {status}: too many tokens") as caught:
        ask([httpx.Response(status, json=body)])
    assert caught.value.reason == "rollout_refused"


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        (413, "RequestTooLargeError", r"raise rollout\.max_request_bytes there, or lower chunks\.context_tokens"),
        (422, "InvalidRequest", r"is it of this collector's version\? .* lower chunks\.context_tokens"),
        (401, "AuthError", "set HEADWATER_TOKEN"),
        (403, "AuthError", "set HEADWATER_TOKEN"),
        (404, "NotFound", r"is rollout\.url right"),
        (405, "MethodNotAllowed", r"is rollout\.url right"),
        (307, "", r"is rollout\.url right"),
        (418, "Teapot", r"is rollout\.url right, and the service of this collector's version\?"),
    ],
)
def test_what_is_configuration_stops_with_its_remedy_and_drops_no_window(status: int, kind: str, remedy: str) -> None:
    body = {"error": {"type": kind, "message": "too many chunks"}}
    with pytest.raises(SettingsError, match=f"answered {status}: too many chunks; {remedy}"):
        ask([httpx.Response(status, json=body)])


def test_an_address_that_is_no_url_stops() -> None:
    with pytest.raises(SettingsError, match=r"rollout\.url is not an address"):
        ask([good()], rollout={"url": "http://rollout:8001,rollout:8002"})


def bare(token_ids: list[int]) -> dict[str, Any]:
    return {"token_ids": token_ids, "text": "x", "finish_reason": "stop", "weight_version": 0}


ODD: list[Callable[[], httpx.Response]] = [
    lambda: httpx.Response(404, text="<html>no such page</html>"),
    lambda: httpx.Response(405),
    lambda: httpx.Response(308, headers={"Location": "http://elsewhere"}),
    lambda: httpx.Response(418, json={"error": {"type": "Teapot", "message": "short and stout"}}),
    lambda: httpx.Response(200, text="<html>we are moving</html>"),
    lambda: httpx.Response(200, json={"rollouts": [[{"text": "x"}]]}),
    lambda: httpx.Response(200, json={**ANSWER, "unknown": 1}),
    lambda: httpx.Response(200, json={"rollouts": []}),
    lambda: httpx.Response(200, json={"rollouts": [[bare([3]), bare([4])]]}),
]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_answer_stops_at_the_start_and_is_waited_out_later(odd: Callable[[], httpx.Response]) -> None:
    """Never guessed, and no window is dropped for it."""
    with pytest.raises(SettingsError, match=r"is rollout\.url right, and the service of this collector's version\?"):
        ask([odd()])
    answers = [good(), *(odd() for _ in range(20)), good()]
    left = iter(answers)
    assert post(lambda _request: next(left), num_requests=2).rollouts[0][0].token_ids == (3,)
    assert next(left, None) is None


def test_a_request_with_odd_answers_while_others_are_answered_well_is_at_fault() -> None:
    num_odd = 0

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal num_odd
        if b'"seed":13' not in request.content:
            return good()
        num_odd += 1
        return httpx.Response(200, text="")

    async def run() -> None:
        settings = Settings.model_validate({"rollout": {"url": "http://a"}, "collector": {"max_backoff_s": 0.01}})
        async with http_client(settings, token="", transport=httpx.MockTransport(handle)) as http:
            services = build_services(settings, http)
            await services.roll_out(REQUEST, document="d")
            poison = asyncio.create_task(services.roll_out(REQUEST.model_copy(update={"seed": 13}), document="p"))
            while not poison.done():
                assert services.trouble == {} or "not a RolloutResponse" in services.trouble["rollout"]
                if num_odd > 10:  # long enough alone: nobody else was answered meanwhile
                    await services.roll_out(REQUEST, document="d")
                await asyncio.sleep(0.005)
            with pytest.raises(RefusedRequestError, match="not a RolloutResponse") as caught:
                await poison
            assert caught.value.reason == "rollout_refused"

    asyncio.run(run())
    assert num_odd >= 11


def test_attempts_end_where_asked() -> None:
    with pytest.raises(RefusedRequestError, match=r"after 2 attempts, collector\.max_attempts") as caught:
        ask([httpx.Response(503)] * 2, collector={"max_attempts": 2})
    assert caught.value.reason == "rollout_unavailable"


def test_retry_after_is_honoured() -> None:
    started = time.monotonic()
    ask([httpx.Response(503, headers={"Retry-After": "0.3"}), good()])
    assert time.monotonic() - started >= 0.3


def test_going_away_and_coming_back_are_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="services.collector.clients"):
        ask([*(httpx.ConnectError("refused") for _ in range(5)), good()])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "rollout is down, retrying" in caplog.messages[0]
    assert caplog.messages[1] == "rollout is back"


def test_every_request_has_a_connection_of_its_own_so_that_replicas_share_the_load() -> None:
    async def run() -> int:
        num_connections = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_connections
            num_connections += 1
            content = good().content
            with contextlib.suppress(asyncio.IncompleteReadError):  # until the other side closes it
                while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                    await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        settings = Settings.model_validate({"rollout": {"url": f"http://127.0.0.1:{port}"}})
        async with server, http_client(settings, token="word") as http:
            for _ in range(3):
                await build_services(settings, http).roll_out(REQUEST, document="0.0.0")
        return num_connections

    assert asyncio.run(run()) == 3
