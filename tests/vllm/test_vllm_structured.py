"""Answers that vLLM constrains to a pattern, so that every verdict can be read."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.engine.base import Sampling
from services.judge.questions import QUESTIONS
from services.judge.reading import answer_pattern, read_verdict
from shared.errors import PromptError
from tests.services.judge.judges import judgement_of, make_judge, make_window, prompt_file
from tests.vllm.subjects import MAX_QUEUED, Subject, vllm_subject

PROMPT = [9, 8, 7]
VERDICTS = QUESTIONS["quality"].verdicts


@pytest.fixture(scope="module")
def constrained(model: Path) -> Iterator[Subject]:
    with vllm_subject(model, constrains=True) as subject:
        yield subject


def test_a_model_that_writes_nonsense_still_gives_verdicts(constrained: Subject) -> None:
    max_tokens, pattern = answer_pattern(VERDICTS, max_characters=50)
    sampling = Sampling(max_tokens=max_tokens, num_samples=32, temperature=1.5, seed=3, pattern=pattern)
    (answers,) = constrained.do(constrained.engine.generate([PROMPT], sampling))
    assert all(re.search(r"(^|\n)Verdict: (A|B|tie)$", answer.text) for answer in answers)
    assert {read_verdict(answer.text, VERDICTS) for answer in answers} == {0.0, 0.5, 1.0}
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert len({answer.text for answer in answers}) > 24


def test_the_same_request_gives_the_same_answers(constrained: Subject) -> None:
    sampling = Sampling(max_tokens=30, num_samples=4, seed=3, pattern="[a-z ]{8,20}")
    first = constrained.do(constrained.engine.generate([PROMPT], sampling))
    assert constrained.do(constrained.engine.generate([PROMPT], sampling)) == first


def test_requests_without_a_pattern_are_answered_as_ever(constrained: Subject, vllm_engine: Subject) -> None:
    sampling = Sampling(max_tokens=200, num_samples=8, temperature=2.0, seed=3)
    free = constrained.do(constrained.engine.generate([PROMPT], sampling))
    assert vllm_engine.do(vllm_engine.engine.generate([PROMPT], sampling)) == free


def test_the_judge_reads_every_structured_answer(constrained: Subject, tmp_path: Path) -> None:
    """Three texts make three pairs of five answers each, the safety of three texts five answers each."""
    assert constrained.engine.can_constrain
    narrow = {"max_queued_requests": MAX_QUEUED}
    (tmp_path / "pairs").mkdir()
    asked = {"verdict": "structured", "max_answer_tokens": 10}
    criteria = {
        "quality": asked | {"schedule": "all_pairs", "prompt": prompt_file(tmp_path / "pairs", "A: {a} B: {b}")},
        "safety": asked | {"prompt": prompt_file(tmp_path, "Safe? {candidate}")},
    }
    judge = make_judge(constrained.engine, criteria=criteria, chat=False, max_retries=0, engine=narrow)
    judgement = constrained.do(judgement_of(judge, make_window(" one", " two", " three")))
    assert (judgement.num_calls, judgement.num_failures) == (30, 0)
    assert sum(score or 0.0 for score in judgement.scores["quality"]) == pytest.approx(1.5)
    assert re.search(r"(^|\n)Verdict: (A|B|tie)$", judgement.reasoning)


def test_an_engine_that_was_not_started_for_it_says_so(vllm_engine: Subject) -> None:
    assert not vllm_engine.engine.can_constrain
    with pytest.raises(PromptError, match="was not started for answers that follow a pattern"):
        vllm_engine.do(vllm_engine.engine.generate([PROMPT], Sampling(max_tokens=4, pattern="a")))
