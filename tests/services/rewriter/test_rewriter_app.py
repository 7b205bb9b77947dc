"""The rewriter over HTTP."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from services.rewriter.app import build_app
from shared import metrics
from shared.api import RewriteResponse
from shared.errors import EngineError, SettingsError
from shared.settings import Secrets, Settings
from tests.services.fakes import FakeEngine
from tests.services.serving import wait_until

TOKEN = {"Authorization": "Bearer t0ken"}
SECRETS = Secrets(token="t0ken")
PREFIX = "The moon moves around the"


def settings(policy: Path | str) -> Settings:
    return Settings.model_validate({"policy": {"model": str(policy)}, "rewriter": {"engine": {"model": "teacher"}}})


@contextmanager
def serving(engine: FakeEngine, policy: Path) -> Iterator[TestClient]:
    app = build_app(settings(policy), SECRETS, engine=engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, what="the rewriter")
        yield client


def ask(client: TestClient, *suffixes: str) -> Any:
    text, items = PREFIX, []
    for suffix in suffixes or (" earth.",):
        items.append({"start": len(text), "end": len(text + suffix), "max_suffix_tokens": 16})
        text += suffix
    return client.post("/v1/rewrites", headers=TOKEN, json={"text": text, "items": items})


def outcomes() -> dict[str, float]:
    names = ("whole", "cut", "empty", "refused", "overlong")
    return {
        name: metrics.REGISTRY.get_sample_value("headwater_rewrites_total", {"outcome": name}) or 0.0 for name in names
    }


def test_rewrites_come_back_in_order_and_are_counted(tiny_model: Path) -> None:
    answers = {" a": " one", " b": "I cannot", " c": " word" * 40}
    engine = FakeEngine(
        answer=lambda prompt, index: next(text for key, text in answers.items() if f"{key}\n</passage-" in prompt)
    )
    before = outcomes()
    with serving(engine, tiny_model) as client:
        answer = ask(client, *answers)
    rewrites = RewriteResponse.model_validate_json(answer.content).rewrites
    assert [rewrite.refusal for (rewrite,) in rewrites] == ["", "refused", ""]
    assert (rewrites[0][0].text, len(rewrites[2][0].token_ids)) == (" one", 16)
    grown = {name: count - before[name] for name, count in outcomes().items()}
    assert grown == {"whole": 1, "cut": 1, "empty": 0, "refused": 1, "overlong": 0}


def test_a_failing_engine_is_503_for_the_whole_request(tiny_model: Path) -> None:
    with serving(FakeEngine(answer=lambda prompt, index: EngineError("away")), tiny_model) as client:
        answer = ask(client)
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "EngineError")


def test_readiness_names_engine_and_model(tiny_model: Path) -> None:
    with serving(FakeEngine(), tiny_model) as client:
        ready = client.get("/readyz").json()
    assert (ready["service"], ready["engine"], ready["model"]) == ("rewriter", "transformers", "teacher")


@pytest.mark.parametrize(
    ("policy", "message"), [("", "policy.model is empty"), ("/nowhere/at/all", "has no tokenizer that can be loaded")]
)
def test_a_policy_without_tokenizer_ends_the_process(policy: str, message: str) -> None:
    app = build_app(settings(policy), SECRETS, engine=FakeEngine())
    with TestClient(app):
        wait_until(lambda: hasattr(app.state, "failure"), what="the failure")
    assert isinstance(app.state.failure, SettingsError)
    assert message in str(app.state.failure)


def test_the_schema_carries_an_example_that_parses() -> None:
    schema = build_app(settings("x"), SECRETS, engine=FakeEngine()).openapi()
    content = schema["paths"]["/v1/rewrites"]["post"]["responses"]["200"]["content"]["application/json"]
    assert RewriteResponse.model_validate(content["example"]).rewrites[1][0].refusal == "refused"
