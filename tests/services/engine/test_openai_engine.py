"""The engine behind OpenAI-compatible endpoints, against real HTTP servers: our own and a scripted one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.engine.base import Sampling
from services.engine.openai import OpenAIEngine
from services.rollout.app import build_app
from shared.engine_settings import EngineSettings
from shared.errors import EngineError, HeadwaterError, OverloadedError, PromptError, RequestError
from tests.services.engine.scripted_endpoint import Endpoint, serving, with_engine
from tests.services.engine.test_hf_engine import check_scores, run, started
from tests.services.rollout.conftest import SECRETS, TOKEN, make_settings
from tests.services.serving import running


@pytest.fixture(scope="module")
def policy_url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(build_app(make_settings(tiny_model, tmp_path_factory.mktemp("run")), SECRETS)) as url:
        yield url


def test_it_answers_as_the_model_behind_the_endpoint(
    policy_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    sampling = Sampling(max_tokens=6, num_samples=2, seed=3)
    far = with_engine(policy_url, lambda engine: engine.generate(["The moon", [9, 10]], sampling))
    with started(tiny_model) as local:
        near = run(local.generate(["The moon", [9, 10]], sampling))
    texts = [[generation.text for generation in of_prompt] for of_prompt in far]
    assert texts == [[generation.text for generation in of_prompt] for of_prompt in near]


def test_echoed_scores_are_the_models_own(policy_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLICY_KEY", TOKEN)
    prompt, continuations = [52, 258], [[40], [41, 42, 43]]
    far = with_engine(policy_url, lambda engine: engine.score(prompt, continuations), key_variable="POLICY_KEY")
    check_scores(tiny_model, prompt, continuations, far)


def test_a_wrong_key_names_its_variable(policy_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLICY_KEY", "wrong")
    with pytest.raises(EngineError, match="POLICY_KEY"):
        with_engine(policy_url, lambda engine: engine.score("a", ["b"]), key_variable="POLICY_KEY")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Endpoint, str]]:
    endpoint = Endpoint()
    with serving(endpoint) as url:
        yield endpoint, url


@pytest.fixture
def endpoint(served: tuple[Endpoint, str]) -> Endpoint:
    vars(served[0]).update(vars(Endpoint()))
    return served[0]


@pytest.fixture
def chat_url(served: tuple[Endpoint, str], endpoint: Endpoint) -> str:
    return served[1]


def test_chat_prompts_go_to_the_chat_route(endpoint: Endpoint, chat_url: str) -> None:
    sampling = Sampling(max_tokens=9, num_samples=2, temperature=0.5, top_p=0.6, seed=4)
    (answers,) = with_engine(chat_url, lambda engine: engine.generate([engine.render_chat("Is it so?")], sampling))
    assert [answer.text for answer in answers] == ["answer 0", "answer 1"]
    asked = endpoint.asked[-1]
    assert asked["messages"] == [{"role": "user", "content": "Is it so?"}]
    assert {"n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.6, "seed": 4}.items() <= asked.items()


def test_labels_are_scored_by_the_top_log_probs_and_others_have_no_score(chat_url: str) -> None:
    async def work(engine: OpenAIEngine) -> None:
        assert engine.can_score
        assert await engine.score(engine.render_chat("So?"), [" yes", " no"]) == [[-0.5], [-1.5]]
        with pytest.raises(PromptError, match="'maybe'"):
            await engine.score(engine.render_chat("So?"), ["maybe"])
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.encode("a")

    with_engine(chat_url, work)


def test_an_endpoint_without_log_probs_cannot_score(endpoint: Endpoint, chat_url: str) -> None:
    endpoint.top = {}

    async def work(engine: OpenAIEngine) -> None:
        assert not engine.can_score
        with pytest.raises(EngineError, match="gives no log-probs"):
            await engine.score(engine.render_chat("So?"), [" yes"])

    with_engine(chat_url, work)


@pytest.mark.parametrize(("patterned", "holds"), [("007", True), ("", False), ("0071", False)])
def test_whether_an_endpoint_holds_texts_to_patterns_is_tried(
    endpoint: Endpoint, chat_url: str, patterned: str, holds: bool
) -> None:
    endpoint.patterned = patterned

    async def work(engine: OpenAIEngine) -> bool:
        if engine.can_constrain:
            await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=9, pattern="a|b"))
            assert endpoint.asked[-1]["structured_outputs"] == {"regex": "a|b"}
        else:
            with pytest.raises(PromptError, match="pattern"):
                await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=9, pattern="a|b"))
        return engine.can_constrain

    assert with_engine(chat_url, work, constrains=True) == holds
    endpoint.asked.clear()
    assert not with_engine(chat_url, work)
    assert not any("structured_outputs" in asked for asked in endpoint.asked), "not tried where nobody asks"


def test_a_passing_failure_is_retried(endpoint: Endpoint, chat_url: str) -> None:
    async def work(engine: OpenAIEngine) -> str:
        endpoint.num_failures, endpoint.status = 2, 503
        ((answer,),) = await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        return answer.text

    assert with_engine(chat_url, work) == "answer 0"


@pytest.mark.parametrize(("status", "kind", "retryable"), [(500, EngineError, True), (400, RequestError, False)])
def test_lasting_failures_become_our_errors(
    endpoint: Endpoint, chat_url: str, status: int, kind: type[HeadwaterError], retryable: bool
) -> None:
    async def work(engine: OpenAIEngine) -> None:
        endpoint.num_failures, endpoint.status = 99, status
        with pytest.raises(kind, match=str(status)) as caught:
            await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        assert caught.value.retryable == retryable

    with_engine(chat_url, work)


def test_retries_wait_as_the_endpoint_asks_and_no_longer_than_the_timeout(endpoint: Endpoint, chat_url: str) -> None:
    async def work(engine: OpenAIEngine) -> None:
        endpoint.num_failures, endpoint.status, endpoint.headers = 1, 503, {"retry-after": "30"}
        asked = len(endpoint.asked)
        with pytest.raises(EngineError, match=r"no answer within engine\.timeout_s = 2"):
            await engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1))
        assert len(endpoint.asked) == asked + 1

    with_engine(chat_url, work, timeout_s=2)


def test_more_requests_than_allowed_are_refused(chat_url: str) -> None:
    async def work(engine: OpenAIEngine) -> None:
        prompts = [engine.render_chat("So?")] * 3
        with pytest.raises(OverloadedError):
            await engine.generate(prompts, Sampling(max_tokens=1))

    with_engine(chat_url, work, max_queued_requests=2)


def test_an_endpoint_that_is_loading_is_waited_for(endpoint: Endpoint, chat_url: str) -> None:
    endpoint.num_starting = 9
    with_engine(chat_url, lambda engine: engine.generate([engine.render_chat("So?")], Sampling(max_tokens=1)))
    assert endpoint.num_starting == 0


def test_an_unreachable_endpoint_is_waited_for_and_then_an_error() -> None:
    """Secrets in its URL are in no name and no error."""
    url = "http://me:hUsh@127.0.0.1:9"
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/v1 can't be reached") as caught:
        with_engine(url, lambda engine: engine.score("a", ["b"]), timeout_s=0.5)
    assert "hUsh" not in str(caught.value)
    engine = OpenAIEngine(EngineSettings(kind="openai", model="m", endpoint=f"{url}/v1?key=hUsh"))
    assert engine.name == "openai:m@http://127.0.0.1:9/v1"
