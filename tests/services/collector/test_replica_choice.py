"""Which replica gets a request: by the document's hash, by load, past those that are away."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import httpx
from starlette.responses import Response

from services.collector.clients import Services, build_services, http_client
from services.collector.replicas import Replica, Replicas
from shared import metrics
from shared.api import RolloutRequest
from shared.settings import Secrets, Settings
from tests.services.collector.processes import free_port, served
from tests.services.collector.runs import collecting, until
from tests.services.collector.stub_services import StubServices
from tests.services.collector.test_outages import MakeSettings

URLS = ("http://a", "http://b:81/", "http://c")
DOCUMENTS = [f"0.0.{position}" for position in range(600)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def replicas_of(urls: Sequence[str] = URLS, clock: Clock | None = None) -> Replicas:
    return Replicas("rollout", urls, clock or Clock())


def url_for(replicas: Replicas, document: str, after: Sequence[Replica] = ()) -> str:
    with replicas.place(document, after=after) as replica:
        return replica.url if replica else ""


def test_a_document_has_one_replica_and_all_replicas_have_documents() -> None:
    first, second = replicas_of(), replicas_of(URLS[::-1])
    places = [url_for(first, document) for document in DOCUMENTS]
    assert places == [url_for(second, document) for document in DOCUMENTS], "whatever their order in the setting"
    counts = Counter(places)
    assert set(counts) == {"http://a", "http://b:81", "http://c"}
    assert min(counts.values()) > 150


def test_a_replica_that_comes_takes_only_its_own_share() -> None:
    few, more = replicas_of(), replicas_of([*URLS, "http://d"])
    moved = [document for document in DOCUMENTS if url_for(few, document) != url_for(more, document)]
    assert 100 < len(moved) < 200
    assert {url_for(more, document) for document in moved} == {"http://d"}


def test_a_replica_far_above_the_mean_passes_requests_on_and_one_near_it_does_not() -> None:
    """Two replicas, all requests about one document: at most ceil(1.5 * requests / 2) of them stay together."""
    replicas = replicas_of(["http://a", "http://b"])
    with ExitStack() as stack:
        found = [stack.enter_context(replicas.place("0.0.0")) for _ in range(8)]
        assert sorted(Counter(replica.url for replica in found if replica).values()) == [2, 6]
    assert [replica.num_now for replica in replicas.all] == [0, 0]


def test_one_that_is_away_is_tried_after_a_second_by_one_request_and_others_go_on_elsewhere() -> None:
    clock = Clock()
    replicas = replicas_of(clock=clock)
    own = next(replica for replica in replicas.all if replica.url == url_for(replicas, "0.0.0"))
    replicas.note_failure(own, "refused")
    other = url_for(replicas, "0.0.0")
    assert other != own.url
    clock.now += 0.99
    assert url_for(replicas, "0.0.0") == other
    clock.now += 0.01
    with replicas.place("0.0.0") as tried:
        assert tried is own
        assert url_for(replicas, "0.0.0") == other
        replicas.note_failure(own, "refused")
    assert url_for(replicas, "0.0.0") == other
    clock.now += 1.0
    with replicas.place("0.0.0") as tried:
        assert tried is own
        replicas.note_answer(own)
        assert url_for(replicas, "0.0.0") == own.url


def test_a_longer_rest_that_it_asks_for_is_granted() -> None:
    clock = Clock()
    replicas = replicas_of(["http://a", "http://b"], clock)
    replicas.note_failure(replicas.all[0], "full", rest_s=30.0)
    clock.now += 29.0
    assert {url_for(replicas, document) for document in DOCUMENTS} == {"http://b"}
    clock.now += 1.0
    assert {url_for(replicas, document) for document in DOCUMENTS} == {"http://a", "http://b"}


def test_none_is_asked_while_all_rest_but_a_single_address_always_is() -> None:
    replicas, single = replicas_of(), replicas_of(["http://a"])
    for replica in (*replicas.all, *single.all):
        replicas.note_failure(replica, "refused")
    assert url_for(replicas, "0.0.0") == ""
    assert url_for(single, "0.0.0") == "http://a"


def test_a_request_tries_another_replica_than_the_one_that_failed_it() -> None:
    replicas = replicas_of()
    own = next(replica for replica in replicas.all if replica.url == url_for(replicas, "0.0.0"))
    assert url_for(replicas, "0.0.0", after=[own]) != own.url


def test_requests_are_counted_by_replica_and_by_why_it_was_picked() -> None:
    def count(name: str, choice: str) -> float:
        return float(metrics.replica_requests_total.labels("rollout", name, choice)._value.get())

    replicas = replicas_of(["http://counted-1", "http://me:SECRET@counted-2:81"])
    document = next(one for one in DOCUMENTS if url_for(replicas, one) == "http://counted-1")
    before = count("counted-1", "own")
    url_for(replicas, document)
    assert count("counted-1", "own") == before + 1
    replicas.note_failure(replicas.all[0], "refused")
    url_for(replicas, document)
    assert count("counted-2:81", "away") == 1, "its name has no secrets"


REQUEST = RolloutRequest(token_ids=(1, 2), starts=(1,), num_rollouts=1, max_suffix_tokens=4)


def test_a_dead_replica_is_asked_at_most_once_a_second_over_real_connections() -> None:
    """And comes back by itself. The others answer everything meanwhile."""
    asked: list[float] = []
    is_dead = True

    def dead(path: str, body: Any) -> Response | None:
        asked.append(time.monotonic())
        return Response(status_code=503) if is_dead else None

    async def ask(services: Services, seconds: float) -> int:
        num_answered, ends = 0, time.monotonic() + seconds
        while time.monotonic() < ends:
            documents = [f"0.0.{num_answered + index}" for index in range(6)]
            await asyncio.gather(*(services.roll_out(REQUEST, document=document) for document in documents))
            num_answered += len(documents)
            await asyncio.sleep(0.01)
        return num_answered

    async def run(urls: str) -> None:
        nonlocal is_dead
        settings = Settings.model_validate({"rollout": {"url": urls}})
        async with http_client(settings, token="") as http:
            services = build_services(settings, http)
            for document in DOCUMENTS[:20]:  # one after another: only the first of these can find it dead
                await services.roll_out(REQUEST, document=document)
            num_answered = await ask(services, 2.2)
            assert services.trouble == {}
            assert list(services.lost_replicas) == ["1 of 3 rollout replicas away"]
            assert num_answered > 2 * len(asked)
            assert len(asked) >= 2
            assert all(later - earlier >= 1.0 for earlier, later in pairwise(asked))
            is_dead = False
            await ask(services, 1.2)
            assert services.lost_replicas == {}
            before = len(asked)
            await ask(services, 0.2)
            assert len(asked) > before + 1

    apps = (StubServices(dead).app, StubServices().app, StubServices().app)
    with ExitStack() as stack:
        asyncio.run(run(",".join(stack.enter_context(served(app)) for app in apps)))


def test_status_names_a_dead_replica_and_the_collector_stays_ready(make_settings: MakeSettings) -> None:
    gone, port = free_port(), free_port()
    base, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer word"}

    def detail(path: str) -> tuple[int, str]:
        try:
            answer = httpx.get(f"{base}{path}", headers=headers)
        except httpx.ConnectError:
            return 0, ""
        return answer.status_code, answer.json()["detail"]

    async def run(settings: Settings) -> None:
        async with collecting(settings, Secrets(token="word")) as task:
            await until(lambda: detail("/readyz") == (200, "1 of 2 rollout replicas away"), task=task)
            status, words = await asyncio.to_thread(detail, "/status")
            assert status == 200
            assert f"127.0.0.1:{gone} is away: rollout at http://127.0.0.1:{gone}/v1/rollouts: ConnectError" in words

    with served(StubServices().app) as url:
        rollout = {"url": f"{url},http://127.0.0.1:{gone}"}
        enough = {"port": port, "max_backlog": 400}  # some document has the dead replica as its own
        asyncio.run(run(make_settings(url, rollout=rollout, documents={"max_epochs": 50}, collector=enough)))
