"""The python criterion: a user's own function, checked."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from services.judge.criteria import CriterionError
from services.judge.user_function import PythonCriterion, load_function
from services.judge.verdicts import CallCount
from shared.errors import SettingsError
from tests.services.fakes import FakeEngine
from tests.services.judge.judges import chunk_of, failed, judged, make_judge, make_window


def calling(name: str, **judge: Any) -> dict[str, Any]:
    return {"criteria": {"python": {"function": f"tests.services.judge.scorers:{name}"}}} | judge


def test_a_function_scores_the_candidates_without_any_engine() -> None:
    judgement = judged(FakeEngine(), make_window("1234", "12", reference="1234"), **calling("by_length"))
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 0.5), 0)


def test_an_async_function_is_awaited() -> None:
    assert judged(FakeEngine(), make_window("a", "b", reference="b"), **calling("awaited")).rewards == (0.0, 1.0)


def test_a_candidate_without_a_score_is_unscored() -> None:
    assert judged(FakeEngine(), make_window("a", "", "b", reference="b"), **calling("unless_empty")).rewards == (
        0,
        None,
        1,
    )


def test_messages_name_the_function_of_their_criterion() -> None:
    with pytest.raises(SettingsError, match=r"judge\.criteria\.brevity\.function = 'math:no'"):
        load_function("math:no", setting="judge.criteria.brevity.function")
    window = make_window("a")
    criterion = PythonCriterion(lambda *_: [2.0], 1.0, setting="judge.criteria.brevity.function")
    with pytest.raises(CriterionError, match=r"judge.criteria.brevity.function returned 2.0"):
        asyncio.run(criterion.score(chunk_of(window), seed=0, count=CallCount("brevity")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "returned 1 scores for 2 candidates"),
        ("too_high", "returned 1.5, scores must lie in [0, 1]"),
        ("not_a_number", "returned nan, scores must lie in [0, 1]"),
        ("no_list", "must return a list of numbers, got None"),
        ("raising", "raised HeadwaterError: no such entry"),
        ("slow", "gave no scores within 0.05 s"),
    ],
)
def test_a_wrong_answer_is_a_failure_with_its_message_logged(
    name: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = {"timeout_s": 0.05 if name == "slow" else 60.0}
    with caplog.at_level(logging.WARNING):
        failure = failed(FakeEngine(), make_window("a", "b"), **calling(name, engine=engine))
    assert failure.reason == "python_criterion"
    assert message in caplog.text


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere_at_all:score", "No module named"),
        ("tests.services.judge.scorers:nothing", "has no function 'nothing'"),
        ("tests.services.judge.scorers:NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
        ("broken_scorer:score", "my database is away"),
    ],
)
def test_a_function_that_can_not_be_imported_is_refused_at_start(
    place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_scorer.py").write_text("raise RuntimeError('my database is away')\n")
    with pytest.raises(SettingsError, match=message):
        make_judge(FakeEngine(), criteria={"python": {"function": place}})
