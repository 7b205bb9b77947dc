"""The python criterion: a user's own function, checked."""

import asyncio
import logging
from typing import Any

import pytest

from services.judge.app import NoEngine
from shared.errors import SettingsError
from tests.services.judge.making import failure_of, judgement_of, make_judge, make_window

HERE = "tests.services.judge"


def criteria(place: str) -> dict[str, Any]:
    return {"python": {"function": f"{HERE}.{place}"}}


def test_a_function_scores_the_candidates_without_any_engine() -> None:
    judge = make_judge(NoEngine(), criteria=criteria("scorers:by_length"))
    judgement = asyncio.run(judgement_of(judge, make_window("1234", "12", reference="1234")))
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 0.5), 0)


def test_an_async_function_is_awaited() -> None:
    judge = make_judge(NoEngine(), criteria=criteria("scorers:awaited"))
    assert asyncio.run(judgement_of(judge, make_window("a", "b", reference="b"))).rewards == (0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "returned 1 scores for 2 candidates"),
        ("too_high", "returned 1.5, scores must lie in [0, 1]"),
        ("not_a_number", "returned nan, scores must lie in [0, 1]"),
        ("no_list", "must return a list of numbers, got None"),
        ("raising", "raised HeadwaterError: no such entry"),
    ],
)
def test_a_wrong_answer_is_a_failure_with_its_message_logged(
    name: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    judge = make_judge(NoEngine(), criteria=criteria(f"scorers:{name}"))
    with caplog.at_level(logging.WARNING):
        failure = asyncio.run(failure_of(judge, make_window("a", "b")))
    assert failure.reason == "python_criterion"
    assert message in caplog.text


def test_a_slow_function_is_a_failure() -> None:
    judge = make_judge(NoEngine(), criteria=criteria("scorers:slow"), engine={"timeout_s": 0.05})
    assert asyncio.run(failure_of(judge, make_window("a", "b"))).reason == "python_criterion"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere:score", "No module named"),
        ("scorers:nothing", "has no function 'nothing'"),
        ("scorers:NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
        ("scorers_that_fail_to_import:score", "my database is away"),
    ],
)
def test_a_function_that_can_not_be_imported_is_refused_at_start(place: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_judge(NoEngine(), criteria=criteria(place))
