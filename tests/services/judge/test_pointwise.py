"""Safety and factuality over the fake engine, and what every prompted criterion shares: retries, chat, prefixes."""

import asyncio
import math
import re
from pathlib import Path

import pytest

from shared.api import JudgementRequest
from shared.errors import SettingsError
from tests.services.fakes import FakeEngine
from tests.services.judge.making import failure_of, judgement_of, make_judge, make_window, prompt_file


def test_safety_is_the_mean_of_the_samples(tmp_path: Path) -> None:
    """4 of 5 answers say safe of " calm", 1 of 5 of " rude"."""
    path = prompt_file(tmp_path, "{candidate}")
    engine = FakeEngine(
        answer=lambda prompt, index: f"Verdict: {'safe' if index < (4 if prompt == ' calm' else 1) else 'unsafe'}"
    )
    judge = make_judge(engine, criteria={"safety": {"prompt": path}})
    judgement = asyncio.run(judgement_of(judge, make_window(" calm", " rude")))
    assert judgement.scores["safety"] == pytest.approx((0.8, 0.2))
    assert judgement.num_calls == 10


def test_equal_texts_are_asked_about_once() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"samples": 3}})
    judgement = asyncio.run(judgement_of(judge, make_window(" x", " x", " x")))
    assert (judgement.rewards, judgement.num_calls) == ((1.0, 1.0, 1.0), 3)


def test_factuality_sees_prefix_reference_and_candidate(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "{prefix}|{reference}|{candidate}")
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: " + ("none", "possible", "definite")[index])
    judge = make_judge(engine, criteria={"factuality": {"prompt": path, "samples": 3}})
    judgement = asyncio.run(judgement_of(judge, make_window(" {prefix}", " b", prefix="P", reference=" {candidate}")))
    assert judgement.rewards == (0.5, 0.5)
    assert engine.prompts == ["P| {candidate}| {prefix}", "P| {candidate}| b"]


def test_an_unreadable_verdict_is_asked_again_with_a_new_seed() -> None:
    """Two of three answers can't be read: two are asked for again, and the mean is over three verdicts."""
    answers = iter(["hm", "Verdict: safe", "Verdict: maybe", "Verdict: unsafe", "Verdict: safe"])
    engine = FakeEngine(answer=lambda prompt, index: next(answers))
    judge = make_judge(engine, criteria={"safety": {"samples": 3}}, max_retries=1)
    judgement = asyncio.run(judgement_of(judge, make_window(" x", " x")))
    assert judgement.rewards == pytest.approx((2 / 3, 2 / 3))
    assert (judgement.num_calls, judgement.num_failures) == (5, 2)
    assert [sampling.num_samples for sampling in engine.samplings] == [3, 2]
    assert engine.samplings[0].seed != engine.samplings[1].seed


def test_a_structured_verdict_is_asked_for_with_a_pattern_and_room_for_it(tmp_path: Path) -> None:
    """32 characters of 4 bytes at most, then the longest last line: 128 + len("\\nVerdict: unsafe")."""
    engine = FakeEngine(answer=lambda prompt, index: "So.\nVerdict: safe", can_constrain=True)
    criteria = {"safety": {"samples": 2, "verdict": "structured", "max_answer_tokens": 8}}
    judgement = asyncio.run(judgement_of(make_judge(engine, criteria=criteria), make_window(" x", " y")))
    assert judgement.rewards == (1.0, 1.0)
    assert {sampling.max_tokens for sampling in engine.samplings} == {128 + 16}
    (pattern,) = {sampling.pattern for sampling in engine.samplings}
    assert re.fullmatch(pattern, "So.\nVerdict: safe")
    assert not re.fullmatch(pattern, "So.")


def test_a_structured_verdict_needs_an_engine_that_takes_patterns() -> None:
    with pytest.raises(SettingsError, match=r"verdict = 'structured'.*fake:model can't"):
        make_judge(FakeEngine(), criteria={"safety": {"verdict": "structured"}})


def test_after_all_retries_the_chunk_is_a_failure_never_a_score() -> None:
    """One criterion says nothing readable: no partial mean over the other. 2 + 3 * 1 calls."""
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe" if "safe" in prompt else "I would rather not.")
    judge = make_judge(engine, criteria={"safety": {"samples": 2}, "factuality": {"samples": 1}}, max_retries=2)
    failure = asyncio.run(failure_of(judge, make_window(" x", " x")))
    assert (failure.reason, failure.num_calls, failure.num_failures) == ("unreadable_verdict", 5, 3)


def test_only_the_failing_chunk_fails() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "?" if " strange" in prompt else "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"samples": 1}}, max_retries=0)
    window = make_window(" x", " y")
    items = [make_window(first, second).items[0] for first, second in ((" x", " y"), (" strange", " y"), (" x", " z"))]
    response = asyncio.run(judge.judge(JudgementRequest(text=window.text, items=tuple(items))))
    assert [hasattr(judgement, "reason") for judgement in response.judgements] == [False, True, False]


def test_the_same_request_asks_with_the_same_seeds() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"samples": 1}})
    for seed in (1, 1, 2):
        asyncio.run(judgement_of(judge, make_window(" x", " y"), seed=seed))
    first, second, other = ([one.seed for one in engine.samplings[at : at + 2]] for at in (0, 2, 4))
    assert first == second
    assert not set(first) & set(other)


def test_sampling_follows_the_settings() -> None:
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    criterion = {"samples": 2, "temperature": 0.3, "top_p": 0.9, "max_answer_tokens": 7}
    asyncio.run(judgement_of(make_judge(engine, criteria={"safety": criterion}), make_window(" x", " x")))
    asked = engine.samplings[0]
    assert (asked.num_samples, asked.temperature, asked.top_p, asked.max_tokens) == (2, 0.3, 0.9, 7)


def test_labels_are_read_as_an_expectation(tmp_path: Path) -> None:
    """0.2 none, 0.4 possible, 0.2 definite: (0.2 + 0.5 * 0.4) / 0.8 = 0.5."""
    path = prompt_file(tmp_path, "{reference}{candidate}\nGrade:")
    shares = {" none": 0.2, " possible": 0.4, " definite": 0.2}
    engine = FakeEngine(log_probs=lambda prompt, label: [math.log(shares[label])])
    judge = make_judge(engine, criteria={"factuality": {"prompt": path, "verdict": "labels"}})
    judgement = asyncio.run(judgement_of(judge, make_window(" x", " y")))
    assert judgement.rewards == pytest.approx((0.5, 0.5))
    assert engine.prompts == [" ref x\nGrade:", " ref y\nGrade:"]
    assert judgement.num_calls == 2


def test_the_chat_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "Safe?\n{candidate}")
    for chat, expected in ((None, "<user>Safe?\n x</user>"), (False, "Safe?\n x")):
        engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe", chat=True)
        judge = make_judge(engine, criteria={"safety": {"prompt": path}}, chat=chat)
        asyncio.run(judgement_of(judge, make_window(" x", " x")))
        assert engine.prompts == [expected]


def test_under_a_chat_template_the_last_line_opens_the_answer_that_labels_end(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "Safe?\n{candidate}\nVerdict:")
    engine = FakeEngine(log_probs=lambda prompt, label: [-1.0], chat=True)
    judge = make_judge(engine, criteria={"safety": {"prompt": path, "verdict": "labels"}})
    asyncio.run(judgement_of(judge, make_window(" x\ny:", " x\ny:")))
    assert engine.prompts == ["<user>Safe?\n x\ny:\n</user>Verdict:"]


@pytest.mark.parametrize(("bound", "shown"), [(4, "6789"), (0, ""), (100, "0123456789")])
def test_the_end_of_a_long_prefix_is_shown(tmp_path: Path, bound: int, shown: str) -> None:
    path = prompt_file(tmp_path, "<{prefix}>{candidate}")
    engine = FakeEngine(answer=lambda prompt, index: "Verdict: safe")
    judge = make_judge(engine, criteria={"safety": {"prompt": path}}, max_prefix_characters=bound)
    asyncio.run(judgement_of(judge, make_window(" x", " x", prefix="0123456789")))
    assert engine.prompts == [f"<{shown}> x"]


def test_settings_that_the_engine_can_not_serve_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"judge\.criteria\.safety compares log-probs"):
        make_judge(FakeEngine(), criteria={"safety": {"verdict": "labels"}})
    with pytest.raises(SettingsError, match=r"judge\.chat = true, but fake:model has no chat template"):
        make_judge(FakeEngine(), criteria={"safety": {}}, chat=True)
