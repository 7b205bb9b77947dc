"""Known pairs among the collector's questions: ordinary requests, figures only, and never the cost of a window."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.responses import JSONResponse

from shared.database import ChunkRow, transaction
from shared.records import ScoredWindow
from shared.settings import Settings
from tests.services.collector.processes import served
from tests.services.collector.runs import Seen, collect_all
from tests.services.collector.stub_services import StubServices, judgement

MakeSettings = Callable[..., Settings]
JUDGE = "/v1/judgements"
SCHEDULE = {"schedule": [{"num_rollouts": 2, "kinds": ["original", "rollout"]}], "record_share": 0.0}


def collected(
    make_settings: MakeSettings, stub: StubServices, *, share: float = 1.0, **sections: Any
) -> tuple[Seen, list[ScoredWindow]]:
    collector = SCHEDULE | sections.pop("collector", {})
    with served(stub.app) as url:
        judge = {"url": url, "probe_share": share}
        seen = collect_all(make_settings(url, judge=judge, collector=collector, **sections))
    return seen, sorted(seen.take_all(), key=lambda window: str(window.key))


def is_probe(body: Any) -> bool:
    """Two candidates: the run's own questions are about three."""
    return [len(item["candidates"]) for item in body["items"]] == [2]


def originals(body: Any) -> list[str]:
    return [body["text"][item["start"] : item["end"]] for item in body["items"]]


def a_judge_that_knows(path: str, body: Any) -> JSONResponse | None:
    """Prefers the original, whoever is shown first."""
    if path != JUDGE:
        return None
    found = []
    for item, original in zip(body["items"], originals(body), strict=True):
        wins = [float(candidate["text"] == original) for candidate in item["candidates"]]
        pairs = [{"criterion": "quality", "first": a, "second": 1 - a, "value": wins[a]} for a in (0, 1)]
        found.append(judgement(len(wins)) | {"rewards": wins, "scores": {"quality": wins}, "comparisons": pairs})
    return JSONResponse({"judgements": found})


def test_each_drawn_window_brings_one_probe_that_looks_like_any_question(make_settings: MakeSettings) -> None:
    stub = StubServices(interfere=a_judge_that_knows)
    _, windows = collected(make_settings, stub)
    assert [(len(window.probes), window.probes[0].value, window.probes[0].consistent) for window in windows] == [
        (1, 1.0, True)
    ] * 8
    asked = [body for body in stub.bodies(JUDGE) if is_probe(body)]
    own = next(body for body in stub.bodies(JUDGE) if not is_probe(body))
    assert len(asked) == 8
    for body in asked:
        assert body.keys() == own.keys()
        assert body["items"][0].keys() == own["items"][0].keys()
        texts = [candidate["text"] for candidate in body["items"][0]["candidates"]]
        assert texts.count(originals(body)[0]) == 1
    places = {body["items"][0]["candidates"][0]["text"] == originals(body)[0] for body in asked}
    assert places == {True, False}, "the original is not always the first candidate"


def test_a_run_asks_the_same_probes_again_and_trains_on_none(make_settings: MakeSettings) -> None:
    with_probes, without = StubServices(), StubServices()
    _, probed = collected(make_settings, with_probes, run={"name": "probed"})
    seen, plain = collected(make_settings, without, share=0.0, run={"name": "plain"})
    assert [window.chunks for window in probed] == [window.chunks for window in plain]
    assert [window.probes for window in plain] == [()] * 8
    assert not [body for body in without.bodies(JUDGE) if is_probe(body)]
    with transaction(seen.run.database) as session:
        assert session.scalar(sa.select(sa.func.count()).where(ChunkRow.run_id == "plain")) == 0


def test_probes_cost_their_share(make_settings: MakeSettings) -> None:
    stub = StubServices()
    _, windows = collected(make_settings, stub, share=0.5, documents={"max_epochs": 3})
    asked = [body for body in stub.bodies(JUDGE) if is_probe(body)]
    assert 6 <= len(asked) == sum(len(window.probes) for window in windows) <= 18


@pytest.mark.parametrize(("status", "reason"), [(401, "judge_refused"), (413, "judge_refused"), (200, "unreadable")])
def test_a_probe_that_fails_costs_no_window(make_settings: MakeSettings, status: int, reason: str) -> None:
    def failing(path: str, body: Any) -> JSONResponse | None:
        if path != JUDGE or not is_probe(body):
            return None
        failure = {"reason": "unreadable", "num_calls": 1, "num_failures": 1}
        return JSONResponse({"judgements": [failure]} if status == 200 else {}, status_code=status)

    seen, windows = collected(make_settings, StubServices(interfere=failing))
    assert (len(windows), seen.balance.dropped) == (8, {})
    probes = [probe for window in windows for probe in window.probes]
    assert {(probe.value, probe.reason) for probe in probes} == {(None, reason)}


def test_a_judge_without_an_answer_holds_a_window_for_a_bounded_time(make_settings: MakeSettings) -> None:
    def away(path: str, body: Any) -> JSONResponse | None:
        return JSONResponse({}, status_code=503) if path == JUDGE and is_probe(body) else None

    limit = {"request_timeout_s": 0.6}
    engines = {"engine": {"timeout_s": 0.5}}
    _, windows = collected(make_settings, StubServices(interfere=away), collector=limit, rewriter=engines)
    assert {probe.reason for window in windows for probe in window.probes} == {"judge_unavailable"}
    assert len(windows) == 8


def of_the_base_policy(path: str, body: Any) -> JSONResponse | None:
    if path != "/v1/rollouts":
        return a_judge_that_knows(path, body)
    made = [{"token_ids": [70 + n], "text": chr(102 + n), "finish_reason": "length"} for n in range(2)]
    return JSONResponse({"rollouts": [[one | {"weight_version": 0} for one in made] for _ in body["starts"]]})


def test_rollouts_of_the_base_policy_are_kept_and_shown_against_human_text(make_settings: MakeSettings) -> None:
    stub = StubServices(interfere=of_the_base_policy)
    one_by_one = {"max_windows_in_flight": 1}
    _, windows = collected(make_settings, stub, collector=one_by_one, documents={"max_epochs": 3})
    base = [probe for window in windows for probe in window.probes if probe.kind == "base"]
    assert 4 <= len(base) <= 20
    assert {(probe.value, probe.spoiling) for probe in base} == {(1.0, "")}
    of_base = {"f", "g"}
    shown = [[candidate["text"] for candidate in body["items"][0]["candidates"]] for body in stub.bodies(JUDGE)]
    pairs = [texts for texts in shown if len(texts) == 2 and of_base & set(texts)]
    assert len(pairs) == len(base)


def test_what_the_base_policy_wrote_survives_a_restart(make_settings: MakeSettings) -> None:
    collected(make_settings, StubServices(interfere=of_the_base_policy))
    later = StubServices(interfere=a_judge_that_knows)
    _, windows = collected(make_settings, later, documents={"max_epochs": 2})
    assert {version for window in windows for version in window.weight_versions} == {3}
    base = [probe for window in windows for probe in window.probes if probe.kind == "base"]
    assert len(base) >= 2
    assert {probe.value for probe in base} == {1.0}
