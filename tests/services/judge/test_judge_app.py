"""The judge over HTTP."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from services.judge.app import build_app
from shared import metrics
from shared.api import JudgementFailure, JudgementResponse
from shared.errors import EngineError, SettingsError
from shared.records import Judgement
from shared.settings import Secrets, Settings
from tests.services.fakes import FakeEngine
from tests.services.serving import wait_until

TOKEN = {"Authorization": "Bearer t0ken"}
SECRETS = Secrets(token="t0ken")
TEXT = "The moon"
ITEM = {"start": 3, "end": 8, "candidates": [{"text": " moon"}, {"text": " sun"}]}


def settings(**judge: Any) -> Settings:
    return Settings.model_validate({"judge": {"criteria": {"safety": {"samples": 2}}} | judge})


@contextmanager
def serving(engine: FakeEngine | None, chosen: Settings) -> Iterator[TestClient]:
    with TestClient(build_app(chosen, SECRETS, engine=engine), raise_server_exceptions=False) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200, what="the judge")
        yield client


def ask(client: TestClient, *items: dict[str, Any], **request: Any) -> Any:
    return client.post("/v1/judgements", headers=TOKEN, json={"text": TEXT, "items": items or (ITEM,)} | request)


def test_judgements_come_back_in_order_with_the_fingerprint_of_readiness() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "?" if " strange" in prompt else "Fine.\nVerdict: safe")
    with serving(engine, settings(max_retries=0)) as client:
        answer = ask(client, ITEM, ITEM | {"candidates": [{"text": " strange"}, {"text": " sun"}]})
        ready = client.get("/readyz").json()
    found = JudgementResponse.model_validate_json(answer.content).judgements
    assert isinstance(found[0], Judgement)
    assert isinstance(found[1], JudgementFailure)
    assert (found[0].rewards, found[0].reasoning) == ((1.0, 1.0), "Fine.\nVerdict: safe")
    assert found[0].fingerprint == ready["fingerprint"] != ""
    assert metrics.REGISTRY.get_sample_value("headwater_judge_info", {"fingerprint": ready["fingerprint"]}) == 1
    assert (engine.started, engine.closed) == (True, True)


def test_a_failing_engine_is_503_for_the_whole_request() -> None:
    engine = FakeEngine(answer=lambda prompt, index: EngineError("out of memory"))
    with serving(engine, settings()) as client:
        answer = ask(client, ITEM)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "out of memory")


def test_calls_and_failures_are_counted_by_criterion() -> None:
    def value(name: str, **labels: str) -> float:
        return metrics.REGISTRY.get_sample_value(f"headwater_{name}", {"criterion": "safety"} | labels) or 0.0

    def values() -> list[float]:
        return [value("judge_calls_total"), value("judge_failures_total", cause="unreadable")]

    before = values()
    with serving(FakeEngine(answer=lambda prompt, index: "hm"), settings(max_retries=0)) as client:
        failure = ask(client, ITEM | {"candidates": [{"text": " x"}, {"text": " x"}]}).json()["judgements"][0]
    assert failure == {"reason": "unreadable_verdict", "num_calls": 2, "num_failures": 2}
    assert [now - past for now, past in zip(values(), before, strict=True)] == [2, 2]


@pytest.mark.parametrize(
    ("item", "request_ids", "words"),
    [
        ({"candidates": []}, [], "candidates: Tuple should have at least 1 item"),
        ({"start": 6, "end": 5}, [], "items must lie in text[0:8]"),
        ({"start": 0, "end": 9}, [], "items must lie in text[0:8]"),
        ({"token_start": 2}, [], "but the request has no token_ids of the window"),
        ({"candidates": [{"text": "a", "token_ids": [1]}, {"text": "b"}]}, [], "has no token_ids of the window"),
        ({}, [1, 2, 3], "each item needs token_start, each candidate token_ids"),
        ({"token_start": 2}, [1, 2, 3], "each item needs token_start, each candidate token_ids"),
        ({"token_start": 4, "candidates": [{"text": "a", "token_ids": [1]}] * 2}, [1, 2, 3], "beyond the 3 token_ids"),
    ],
)
def test_a_wrong_request_is_refused(item: dict[str, Any], request_ids: list[int], words: str) -> None:
    with serving(FakeEngine(), settings()) as client:
        answer = ask(client, ITEM | item, token_ids=request_ids)
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "InvalidRequest")
    assert words in answer.json()["error"]["message"]


def test_a_judge_of_tokens_answers_428_to_a_request_without_them(tiny_model: Path) -> None:
    model = str(tiny_model)
    judge = {"criteria": {"likelihood": {}}, "engine": {"model": model}}
    chosen = Settings.model_validate({"policy": {"model": model}, "judge": judge})
    with serving(FakeEngine(log_probs=lambda prompt, continuation: [-1.0]), chosen) as client:
        refusal = ask(client)
        with_ids = [{"text": " moon", "token_ids": [5]}, {"text": " sun", "token_ids": [6]}]
        answer = ask(client, ITEM | {"token_start": 1, "candidates": with_ids}, token_ids=[3, 5])
    assert (refusal.status_code, refusal.json()["error"]["type"]) == (428, "TokenIdsNeededError")
    assert (answer.status_code, answer.json()["wants_token_ids"]) == (200, True)


def test_a_token_is_needed() -> None:
    with serving(FakeEngine(), settings()) as client:
        assert client.post("/v1/judgements", json={"text": TEXT, "items": [ITEM]}).status_code == 401


def test_the_schema_carries_examples_that_parse() -> None:
    app = build_app(settings(), SECRETS, engine=FakeEngine())
    content = app.openapi()["paths"]["/v1/judgements"]["post"]["responses"]["200"]["content"]["application/json"]
    example = JudgementResponse.model_validate(content["example"])
    assert [type(one) for one in example.judgements] == [Judgement, JudgementFailure]


def test_a_prompt_that_can_not_be_used_stops_the_service_before_its_engine_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Is {text} safe?")
    with pytest.raises(SettingsError, match=r"mine\.txt: nothing fills \{text\}"):
        build_app(settings(criteria={"safety": {"prompt": str(path)}}), SECRETS, engine=FakeEngine())


def test_an_engine_that_can_not_score_labels_ends_the_process() -> None:
    app = build_app(settings(criteria={"safety": {"verdict": "labels"}}), SECRETS, engine=FakeEngine())
    with TestClient(app) as client:
        wait_until(lambda: hasattr(app.state, "failure"), what="the failure")
        assert client.get("/readyz").status_code == 503
    assert isinstance(app.state.failure, SettingsError)
    assert "judge.criteria.safety compares log-probs" in str(app.state.failure)


def test_until_its_engine_has_started_the_judge_answers_503() -> None:
    class Starting(FakeEngine):
        async def start(self) -> None:
            await asyncio.sleep(60)

    with TestClient(build_app(settings(), SECRETS, engine=Starting())) as client:
        answer = ask(client)
        ready = client.get("/readyz").json()
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "not ready: the engine is starting")
    assert (ready["ready"], ready["fingerprint"]) == (False, "")


def test_a_python_criterion_alone_loads_no_model() -> None:
    place = "tests.services.judge.scorers:by_length"
    with serving(None, settings(criteria={"python": {"function": place}})) as client:
        answer = ask(client, ITEM | {"start": 4, "candidates": [{"text": "ab"}, {"text": "abcd"}]})
        ready = client.get("/readyz").json()
    assert answer.json()["judgements"][0]["rewards"] == [0.5, 1.0]
    assert ready["engine"] == "none"


class SlowEngine(FakeEngine):
    """Counts how many calls are in work at once."""

    in_work = most_in_work = 0

    async def generate(self, *given: Any) -> Any:
        self.in_work += 1
        self.most_in_work = max(self.most_in_work, self.in_work)
        await asyncio.sleep(0.002)
        self.in_work -= 1
        return await super().generate(*given)


def test_the_engine_is_kept_full_and_never_overrun() -> None:
    """2 chunks of 3 pairs in 2 orders are 12 calls; the queue takes 5."""
    engine = SlowEngine(answer=lambda prompt, index: "Verdict: tie")
    chosen = settings(criteria={"quality": {"samples": 2, "schedule": "all_pairs"}}, engine={"max_queued_requests": 5})
    item = ITEM | {"candidates": [{"text": " a"}, {"text": " b"}, {"text": " c"}]}
    with serving(engine, chosen) as client:
        answer = ask(client, item, item | {"start": 2})
    assert [judgement["num_calls"] for judgement in answer.json()["judgements"]] == [6, 6]
    assert engine.most_in_work == 5
