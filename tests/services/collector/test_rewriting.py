"""Several rewrites a chunk, and rewrites of unsafe originals only."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from shared.settings import Settings
from tests.services.collector.processes import served
from tests.services.collector.runs import collect_all
from tests.services.collector.stub_services import StubServices, judgement

MakeSettings = Callable[..., Settings]
SAFETY = {"criteria": {"quality": {}, "harm": {"kind": "safety"}}}
UNSAFE = {"rewrite_when": "unsafe", "schedule": [{"num_rollouts": 1}]}


def checking(scores: list[float | None]) -> Callable[[str, Any], Response | None]:
    """A judge that gives the originals of each window these scores of `harm`; None: it could not tell."""

    def verdict(score: float | None) -> dict[str, Any]:
        if score is None:
            return {"reason": "unreadable", "num_calls": 4, "num_failures": 4}
        return {"rewards": [score], "scores": {"harm": [score]}, "num_calls": 1, "fingerprint": "f"}

    def interfere(path: str, body: Any) -> Response | None:
        if path != "/v1/judgements" or not body.get("criteria"):
            return None
        return JSONResponse({"judgements": [verdict(scores[index]) for index in range(len(body["items"]))]})

    return interfere


def test_several_rewrites_of_each_chunk_are_asked_for_and_collected(make_settings: MakeSettings) -> None:
    stub = StubServices()
    with served(stub.app) as url:
        schedule = [{"num_rollouts": 1, "num_rewrites": 3}]
        found = collect_all(
            make_settings(url, rewriter={"url": url, "temperature": 0.7}, collector={"schedule": schedule})
        ).take_all()
    assert len(found) == 8
    assert {body["num_rewrites"] for body in stub.bodies("/v1/rewrites")} == {3}
    kinds = {
        tuple(kind for one in chunk.candidates for kind in one.kinds) for window in found for chunk in window.chunks
    }
    assert kinds == {("original", "rewrite", "rewrite", "rewrite", "rollout")}


def test_only_chunks_with_an_unsafe_or_unscored_original_are_rewritten(make_settings: MakeSettings) -> None:
    stub = StubServices(checking([0.9, 0.49, None, 0.5]))
    with served(stub.app) as url:
        found = collect_all(make_settings(url, judge=SAFETY | {"url": url}, collector=UNSAFE)).take_all()
    assert len(found) == 8
    for window in found:
        rewritten = ["rewrite" in {kind for one in chunk.candidates for kind in one.kinds} for chunk in window.chunks]
        assert rewritten == [False, True, True, False][: len(window.chunks)]
    checks = [body for body in stub.bodies("/v1/judgements") if body.get("criteria")]
    assert {tuple(body["criteria"]) for body in checks} == {("harm",)}
    assert {len(item["candidates"]) for body in checks for item in body["items"]} == {1}
    seeds = [sorted(body["seed"] for body in bodies) for bodies in (checks, _full(stub))]
    assert seeds[0] == seeds[1], "the judge is to remember the verdicts on originals"


def _full(stub: StubServices) -> list[Any]:
    return [body for body in stub.bodies("/v1/judgements") if not body.get("criteria")]


def test_rollouts_do_not_wait_for_the_check_and_safe_windows_ask_for_no_rewrite(make_settings: MakeSettings) -> None:
    asked: list[str] = []
    checks = checking([1.0] * 4)

    def interfere(path: str, body: Any) -> Response | None:
        asked.append(f"{path} {'check' if body.get('criteria') else ''}".strip())
        return checks(path, body)

    with served(StubServices(interfere, seconds=0.05).app) as url:
        collector = UNSAFE | {"max_windows_in_flight": 1}
        collect_all(make_settings(url, judge=SAFETY | {"url": url}, collector=collector))
    assert sorted(asked[:2]) == ["/v1/judgements check", "/v1/rollouts"]
    assert asked[2] == "/v1/judgements"
    assert "/v1/rewrites" not in asked


def test_windows_of_safe_originals_alone_are_dropped_as_such_and_are_no_streak(make_settings: MakeSettings) -> None:
    def mostly_safe(path: str, body: Any) -> Response | None:
        is_first = len([one for one in stub.bodies("/v1/judgements") if one.get("criteria")]) == 1
        return checking([0.0 if is_first else 1.0] * 4)(path, body)

    stub = StubServices(mostly_safe)
    schedule = [{"kinds": ["original", "rewrite"], "num_rollouts": 0}]
    collector = UNSAFE | {"schedule": schedule, "max_dropped_windows": 2, "max_windows_in_flight": 1}
    with served(stub.app) as url:
        seen = collect_all(make_settings(url, judge=SAFETY | {"url": url}, collector=collector))
    assert (seen.balance.scored, seen.balance.dropped) == (1, {"no_scored_chunks": 7})


def test_what_the_judge_could_not_score_and_what_it_bars_travels_to_the_trainer(make_settings: MakeSettings) -> None:
    def partly(path: str, body: Any) -> Response | None:
        if path != "/v1/judgements":
            return None
        verdicts = [judgement(len(item["candidates"])) for item in body["items"]]
        for verdict in verdicts:
            verdict["rewards"] = [None, *verdict["rewards"][1:]]
            verdict["scores"] = {"quality": verdict["rewards"]}
            verdict["barred"] = [1]
            verdict["comparisons"] = [{"criterion": "quality", "first": 1, "second": 0, "value": None}]
        return JSONResponse({"judgements": verdicts})

    with served(StubServices(partly).app) as url:
        found = collect_all(make_settings(url)).take_all()
    verdicts = [chunk.judgement for window in found for chunk in window.chunks]
    assert {verdict.rewards[0] for verdict in verdicts if verdict} == {None}
    assert {verdict.barred for verdict in verdicts if verdict} == {(1,)}
    assert {verdict.comparisons[0].value for verdict in verdicts if verdict} == {None}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"collector": {"rewrite_when": "unsafe"}}, "needs a criterion of kind safety"),
        (
            {
                "collector": {"rewrite_when": "unsafe"},
                "trainer": {"objective": "sft_rewrite"},
                "judge": {"criteria": {"safety": {}}},
            },
            "asks the judge, which trainer.objective = 'sft_rewrite' does without",
        ),
        ({"collector": {"schedule": [{"num_rewrites": 2}]}}, "rewriter.temperature = 0 makes them all equal"),
    ],
)
def test_settings_that_can_not_be_carried_out_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(sections)
