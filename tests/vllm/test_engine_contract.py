"""The contract of every engine: the same tests against `transformers`, `openai` and real vLLM."""

import asyncio
import time
from dataclasses import replace

import pytest

from services.engine.base import Generation, Sampling
from shared.errors import HeadwaterError, OverloadedError
from tests.vllm import reference
from tests.vllm.subjects import MAX_QUEUED, Subject

FIRST, SECOND = [52, 258, 297, 263], [17, 18, 19]
TEXT = "The moon"
"""The text of FIRST."""


def texts(answers: list[list[Generation]]) -> list[list[str]]:
    return [[generation.text for generation in of_prompt] for of_prompt in answers]


def test_answers_come_in_the_order_of_prompts_and_samples(subject: Subject) -> None:
    answers = subject.do(subject.engine.generate([FIRST, SECOND], Sampling(max_tokens=8, num_samples=3)))
    assert [len(of_prompt) for of_prompt in answers] == [3, 3]
    assert all(isinstance(generation.text, str) for of_prompt in answers for generation in of_prompt)
    assert {generation.finish_reason for of_prompt in answers for generation in of_prompt} <= {"length", "stop"}
    assert {generation.weight_version for of_prompt in answers for generation in of_prompt} == {0}


def test_seeds_decide_and_rows_count_on_from_them(subject: Subject) -> None:
    def sampling(seed: int) -> Sampling:
        return Sampling(max_tokens=12, num_samples=2, seed=seed)

    both = texts(subject.do(subject.engine.generate([FIRST, SECOND], sampling(5))))
    assert texts(subject.do(subject.engine.generate([FIRST, SECOND], sampling(5)))) == both
    assert texts(subject.do(subject.engine.generate([SECOND], sampling(6)))) == [both[1]]
    assert texts(subject.do(subject.engine.generate([FIRST], sampling(6)))) != [both[0]]


def test_each_prompt_has_its_own_bound_and_the_same_samples(subject: Subject) -> None:
    long = subject.do(subject.engine.generate([FIRST, SECOND], Sampling(max_tokens=12, seed=5)))
    bounded = subject.do(subject.engine.generate([FIRST, SECOND], Sampling.bounded([12, 3], seed=5)))
    assert texts(bounded)[0] == texts(long)[0]
    assert texts(long)[1][0].startswith(texts(bounded)[1][0])
    assert bounded[1][0].token_ids == long[1][0].token_ids[:3]


def test_samples_of_one_prompt_and_equal_rows_differ(subject: Subject) -> None:
    rows = subject.do(subject.engine.generate([FIRST] * 3, Sampling(max_tokens=12, num_samples=3, seed=1)))
    assert len({generation.text for of_prompt in rows for generation in of_prompt}) == 9


def test_greedy_samples_are_the_models_likeliest_continuation(subject: Subject) -> None:
    sampling = Sampling(max_tokens=12, num_samples=2, temperature=0)
    answers = subject.do(subject.engine.generate([FIRST, SECOND], sampling))
    for prompt, of_prompt in zip((FIRST, SECOND), answers, strict=True):
        expected = reference.greedy(subject.model, prompt, 12)
        assert [generation.token_ids or expected for generation in of_prompt] == [expected] * 2
        assert of_prompt[0].text == of_prompt[1].text


def test_text_prompts_mean_their_tokens(subject: Subject) -> None:
    sampling = Sampling(max_tokens=8, seed=3)
    by_text = subject.do(subject.engine.generate([TEXT], sampling))
    assert texts(by_text) == texts(subject.do(subject.engine.generate([FIRST], sampling)))


def test_scores_are_the_models_log_probabilities(subject: Subject) -> None:
    continuations = [[40], [41, 42], [41, 42, 43], [7] * 20]
    scores = subject.do(subject.engine.score(FIRST, continuations))
    for given, continuation in zip(scores, continuations, strict=True):
        assert given == pytest.approx(reference.log_probs(subject.model, FIRST, continuation), abs=1e-3)


def test_a_long_prompt_scores_like_a_short_one_and_again(subject: Subject) -> None:
    """Longer than several blocks of the prefix cache; the second time all of it is cached."""
    prompt, continuations = list(range(20, 120)), [list(range(30, 100)), [3] * 64]
    expected = [reference.log_probs(subject.model, prompt, continuation) for continuation in continuations]
    for _ in range(2):
        scores = subject.do(subject.engine.score(prompt, continuations))
        assert [pytest.approx(row, abs=1e-3) for row in expected] == scores


def test_more_requests_than_allowed_are_refused_at_once(subject: Subject) -> None:
    async def work() -> list[object]:
        sampling = Sampling(max_tokens=64, num_samples=8)
        requests = [subject.engine.generate([FIRST], sampling) for _ in range(3 * MAX_QUEUED)]
        return list(await asyncio.gather(*requests, return_exceptions=True))

    answers = subject.do(work())
    refused = [answer for answer in answers if isinstance(answer, OverloadedError)]
    assert 0 < len(refused) <= 2 * MAX_QUEUED
    assert all(isinstance(answer, (list, OverloadedError)) for answer in answers)


def test_a_caller_that_gives_up_leaves_the_engine_free(subject: Subject) -> None:
    async def work() -> float:
        sampling = Sampling(max_tokens=240, num_samples=64, seed=2)
        long = asyncio.ensure_future(subject.engine.generate([FIRST] * 4, sampling))
        await asyncio.sleep(0.2)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        began = time.monotonic()
        await subject.engine.generate([SECOND], Sampling(max_tokens=1))
        return time.monotonic() - began

    assert subject.do(work()) < 20


@pytest.mark.parametrize(("prompt", "words"), [([1] * 256, "256 tokens"), ([], "empty"), ([300], r"0\.\.299")])
def test_hopeless_prompts_are_refused_for_good(subject: Subject, prompt: list[int], words: str) -> None:
    with pytest.raises(HeadwaterError, match=words) as caught:
        subject.do(subject.engine.generate([prompt], Sampling(max_tokens=4)))
    assert not caught.value.retryable


def test_end_of_sequence_stops_a_sample_and_is_its_last_token(local: Subject) -> None:
    sampling = Sampling(max_tokens=200, num_samples=64, temperature=2.0)
    (generations,) = local.do(local.engine.generate([[9, 8, 7]], sampling))
    stopped = [generation for generation in generations if generation.finish_reason == "stop"]
    assert 0 < len(stopped) < len(generations)
    assert all(generation.token_ids[-1] == 0 for generation in stopped)
    assert all(0 not in generation.token_ids[:-1] for generation in generations)
    assert all("<|end|>" not in generation.text for generation in stopped)
    assert all(len(generation.token_ids) == 200 for generation in generations if generation not in stopped)


def test_the_end_of_the_context_ends_a_sample(local: Subject) -> None:
    ((generation,),) = local.do(local.engine.generate([[9] * 250], Sampling(max_tokens=50, seed=4)))
    assert (len(generation.token_ids), generation.finish_reason) == (6, "length")


def test_token_scores_name_the_likeliest_token(local: Subject) -> None:
    likeliest = reference.greedy(local.model, FIRST, 5)
    ((*scores,),), version = local.do(local.scorer.score_tokens(FIRST, [likeliest]))
    assert tuple(score.best_token_id for score in scores) == likeliest
    assert [score.best_log_prob for score in scores] == [score.log_prob for score in scores]
    assert version == 0


def test_where_a_word_is_written_the_log_probs_of_all_words_are_known(local: Subject) -> None:
    """They are the model's own, whatever the temperature and top_p that the sample was drawn with."""
    engine, words = local.engine, ("A", "B", "7")
    sampling = Sampling(max_tokens=40, num_samples=48, temperature=1.5, top_p=0.95, seed=3)
    (plain,) = local.do(engine.generate([FIRST], sampling))
    (answers,) = local.do(engine.generate([FIRST], replace(sampling, words=words)))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    seen = 0
    for answer in answers:
        for odds in answer.word_odds:
            before = next(n for n in range(40) if len(engine.decode(answer.token_ids[: n + 1])) > odds.start)
            assert answer.text[odds.start] in words
            for word, given in zip(words, odds.log_probs, strict=True):
                known = reference.log_probs(local.model, [*FIRST, *answer.token_ids[:before]], engine.encode(word))
                assert [given] == pytest.approx(known, abs=1e-3)
            seen += 1
    assert seen >= 5


def test_answers_to_questions_without_words_have_no_odds(local: Subject) -> None:
    assert local.engine.can_grade
    ((answer,),) = local.do(local.engine.generate([FIRST], Sampling(max_tokens=20, seed=3)))
    assert answer.word_odds == ()
