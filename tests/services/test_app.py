"""The HTTP side that all services share."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from services.app import create_app
from shared import metrics
from shared.api import Readiness, RolloutRequest
from shared.errors import EngineError, OverloadedError, RequestError
from shared.settings import Secrets

TOKEN = {"Authorization": "Bearer t0ken"}


def make_app(*, service: Any = "rollout", ready: bool = True) -> FastAPI:
    detail, summary = ("", "") if ready else ("no model at http://hub:1", "the model is loading")
    found = Readiness(ready=ready, service=service, model="http://me:word@hub:1/m", detail=detail)
    app = create_app(
        service=service,
        title="Toy",
        description="For tests",
        secrets=Secrets(token="t0ken"),
        readiness=lambda: found,
        summary=lambda: summary,
        max_request_bytes=1000,
    )

    @app.post("/v1/echo/{name}")
    async def echo(name: str, request: RolloutRequest) -> dict[str, Any]:
        return {"name": name, "starts": request.starts}

    @app.get("/v1/requests-in-flight")
    async def requests_in_flight() -> float | None:
        return metrics.REGISTRY.get_sample_value("headwater_requests_in_flight")

    @app.post("/v1/fail/{kind}")
    async def fail(kind: str) -> None:
        errors = {"engine": EngineError, "overloaded": OverloadedError, "request": RequestError, "bug": KeyError}
        raise errors[kind]("why and what to do")

    return app


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(make_app(), raise_server_exceptions=False) as client:
        yield client


BODY = {"token_ids": [1, 2, 3], "starts": [1, 2], "num_rollouts": 1, "max_suffix_tokens": 4}


def test_health_and_readiness_are_open(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").status_code == 200


def test_not_ready_is_503_with_the_reason_in_a_few_words_for_everybody_and_in_full_for_some() -> None:
    client = TestClient(make_app(ready=False))
    open_answer = client.get("/readyz").json()
    assert {"detail": "the model is loading", "ready": False}.items() <= open_answer.items()
    assert open_answer["model"] == "http://hub:1/m"
    assert {"detail": "no model at http://hub:1"}.items() <= client.get("/status", headers=TOKEN).json().items()
    assert (client.get("/readyz").status_code, client.get("/status", headers=TOKEN).status_code) == (503, 503)
    assert client.get("/status").status_code == 401


@pytest.mark.parametrize("path", ["/metrics", "/status", "/docs", "/openapi.json", "/v1/echo/a", "/nowhere"])
def test_everything_else_needs_the_token(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "AuthError"
    assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.get(path, headers=TOKEN).status_code != 401


@pytest.mark.parametrize(
    ("kind", "status", "error_type"),
    [("engine", 503, "EngineError"), ("overloaded", 503, "OverloadedError"), ("request", 422, "RequestError")],
)
def test_errors_have_one_form(client: TestClient, kind: str, status: int, error_type: str) -> None:
    answer = client.post(f"/v1/fail/{kind}", headers=TOKEN)
    assert answer.status_code == status
    assert answer.json() == {"error": {"type": error_type, "message": "why and what to do"}}
    assert (answer.headers.get("retry-after") is not None) == (status == 503)


def test_an_invalid_body_is_422_naming_the_place(client: TestClient) -> None:
    answer = client.post("/v1/echo/a", headers=TOKEN, json=BODY | {"num_rollouts": 0})
    assert answer.status_code == 422
    assert "body.num_rollouts" in answer.json()["error"]["message"]
    assert client.post("/v1/echo/a", headers=TOKEN, content=b"{not json").status_code == 422


def test_bugs_and_unknown_routes_have_the_same_form(client: TestClient) -> None:
    for path, status, kind in (("/v1/fail/bug", 500, "InternalError"), ("/nowhere", 404, "NotFound")):
        answer = client.post(path, headers=TOKEN)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)


def test_a_long_body_is_413_with_and_without_its_length(client: TestClient) -> None:
    declared = client.post("/v1/echo/a", headers=TOKEN, content=b" " * 1001)
    chunked = client.post(
        "/v1/echo/a", headers=TOKEN | {"Content-Type": "application/json"}, content=(b" " * 100 for _ in range(11))
    )
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "RequestTooLargeError"


def test_requests_are_counted_by_route_template(client: TestClient) -> None:
    labels = {"route": "/v1/echo/{name}", "status": "200"}
    before = metrics.REGISTRY.get_sample_value("headwater_requests_total", labels) or 0.0
    assert client.post("/v1/echo/a", headers=TOKEN, json=BODY).status_code == 200
    assert metrics.REGISTRY.get_sample_value("headwater_requests_total", labels) == before + 1
    assert "headwater_requests_total" in client.get("/metrics", headers=TOKEN).text


def test_requests_of_work_are_counted_while_they_are_in_flight_and_no_longer(client: TestClient) -> None:
    before = metrics.REGISTRY.get_sample_value("headwater_requests_in_flight")
    assert before is not None
    assert client.get("/v1/requests-in-flight", headers=TOKEN).json() == before + 1
    assert client.post("/v1/fail/bug", headers=TOKEN).status_code == 500
    assert f"headwater_requests_in_flight {before}\n" in client.get("/metrics", headers=TOKEN).text


@pytest.mark.parametrize("role", metrics.SERVICES)
def test_a_service_shows_the_metrics_of_its_role_only(role: str) -> None:
    shown = TestClient(make_app(service=role)).get("/metrics", headers=TOKEN).text
    assert "\nprocess_resident_memory_bytes " in shown
    owners = {
        "headwater_ready": metrics.SERVICES,
        "headwater_engine_queued_requests": metrics.ENGINES,
        "headwater_weight_version": ("rollout",),
        "headwater_leased_parts": ("collector",),
        "headwater_step": (),
    }
    assert {name: f"\n{name} " in shown for name in owners} == {name: role in roles for name, roles in owners.items()}


def test_the_schema_names_the_token_and_carries_examples(client: TestClient) -> None:
    schema = client.get("/openapi.json", headers=TOKEN).json()
    assert schema["security"] == [{"bearer": []}]
    assert schema["paths"]["/healthz"]["get"]["security"] == []
    assert schema["components"]["schemas"]["RolloutRequest"]["examples"][0]["starts"] == [2, 4]
