"""Windows in a row that can't be scored: held back, then dropped by the next success, or left for another start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from shared.errors import CollectingError, SourceError
from shared.settings import Settings
from tests.services.collector.processes import CollectorProcess, served
from tests.services.collector.runs import Seen, collect_all
from tests.services.collector.stub_services import StubServices, instead

MakeSettings = Callable[..., Settings]
REFUSAL = {"error": {"type": "RequestError", "message": "no such criterion"}}
ONE_BY_ONE = {"max_windows_in_flight": 1, "max_dropped_windows": 3}


def refusing(path: str, body: Any) -> Response | None:
    return JSONResponse(REFUSAL, status_code=422) if path == "/v1/judgements" else None


def test_too_many_in_a_row_stop_the_collector_and_the_next_one_scores_them_all(make_settings: MakeSettings) -> None:
    words = r"3 windows in a row could not be scored \(judge_refused 3\), .*no such criterion.*max_dropped_windows"
    stub = StubServices(refusing)
    with served(stub.app) as url, pytest.raises(CollectingError, match=words):
        collect_all(make_settings(url, collector=ONE_BY_ONE))
    seen = Seen(make_settings("http://a"))
    assert len(stub.bodies("/v1/judgements")) == 3
    assert (seen.balance.dropped, seen.balance.scored) == ({}, 0)
    assert seen.balance.reading >= 3
    with served(StubServices().app) as url:
        assert len(collect_all(make_settings(url)).take_all()) == 8
    assert (seen.balance.dropped, seen.balance.reading) == ({}, 0)


def test_the_process_ends_with_the_status_of_a_wrong_setting_and_one_line(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    with served(StubServices(refusing).app) as url:
        process = CollectorProcess(make_settings(url, collector=ONE_BY_ONE), tmp_path)
        assert process.process.wait(90) == 1
    errors = [line for line in process.log.read_text().splitlines() if '"level": "error"' in line]
    assert len(errors) == 1
    assert "3 windows in a row could not be scored" in errors[0]
    assert "Traceback" not in process.log.read_text()


def test_a_scored_window_ends_the_streak_and_drops_what_was_held_back(make_settings: MakeSettings) -> None:
    """Two of three fail: never three in a row. The last two fail at the end of the part."""

    def often(path: str, body: Any) -> Response | None:
        return refusing(path, body) if len(stub.bodies("/v1/judgements")) % 3 != 0 else None

    stub = StubServices(often)
    with served(stub.app) as url:
        seen = collect_all(make_settings(url, collector=ONE_BY_ONE))
    assert (seen.balance.dropped, seen.balance.scored, seen.balance.reading) == ({"judge_refused": 6}, 2, 0)


def test_windows_whose_candidates_are_all_equal_are_no_streak(make_settings: MakeSettings) -> None:
    copy = {"text": "x", "token_ids": [5], "finish_reason": "length"}

    def copies(body: Any) -> dict[str, Any]:
        return {"rollouts": [[copy | {"weight_version": 3}] * 2 for _ in body["starts"]]}

    schedule = [{"kinds": ["rollout"], "num_rollouts": 2}]
    with served(StubServices(instead("/v1/rollouts", copies)).app) as url:
        settings = make_settings(url, collector=ONE_BY_ONE | {"schedule": schedule}, documents={"max_epochs": 2})
        with pytest.raises(SourceError, match=r"16 read, dropped \{'no_preference': 16\}"):
            collect_all(settings)


def test_windows_without_two_presentable_candidates_are_a_streak(make_settings: MakeSettings) -> None:
    """A policy from scratch whose rollouts are never text would use up the corpus without being trained once."""
    broken = {"text": "", "token_ids": [5], "finish_reason": "length", "weight_version": 0, "refusal": "broken_text"}

    def garbage(body: Any) -> dict[str, Any]:
        return {"rollouts": [[broken] * 2 for _ in body["starts"]]}

    schedule = [{"kinds": ["original", "rollout"], "num_rollouts": 2}]
    stopped = pytest.raises(CollectingError, match=r"no_scored_chunks 3.*too_few_candidates")
    with served(StubServices(instead("/v1/rollouts", garbage)).app) as url, stopped:
        collect_all(make_settings(url, collector=ONE_BY_ONE | {"schedule": schedule}))
