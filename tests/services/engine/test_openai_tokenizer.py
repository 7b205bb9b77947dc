"""An endpoint whose tokenizer is here: prompts are rendered and encoded by the engine and sent as token ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from services.engine.base import Sampling
from services.engine.openai import OpenAIEngine
from services.rollout.app import build_app
from shared.errors import EngineError, SettingsError
from tests.services.engine.scripted_endpoint import Endpoint, serving, with_engine
from tests.services.engine.test_hf_engine import check_scores
from tests.services.rollout.conftest import SECRETS, TOKEN, make_settings
from tests.services.serving import running

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '' if thinks else '<no thoughts>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of the model, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    found = AutoTokenizer.from_pretrained(tiny_model)
    found.chat_template = TEMPLATE
    found.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_endpoint() -> Iterator[tuple[Endpoint, str]]:
    endpoint = Endpoint(has_completions=True)
    with serving(endpoint) as url:
        yield endpoint, url


def test_chats_are_rendered_here_and_sent_as_token_ids(chat_endpoint: tuple[Endpoint, str], tokenizer: Path) -> None:
    endpoint, url = chat_endpoint

    async def work(engine: OpenAIEngine) -> None:
        rendered = engine.render_chat("So?")
        assert rendered == "[system]Be brief.</s>[user]So?</s>[assistant]<no thoughts>"
        await engine.generate([rendered], Sampling(max_tokens=3))
        assert endpoint.asked[-1]["prompt"] == engine.encode(rendered)
        await engine.generate([(5, 6)], Sampling(max_tokens=3))
        assert endpoint.asked[-1]["prompt"] == [5, 6]
        assert not any("messages" in asked for asked in endpoint.asked), "that route is not even probed"

    settings: dict[str, Any] = {"system_prompt": "Be brief.", "chat_template_arguments": {"thinks": False}}
    with_engine(url, work, tokenizer=str(tokenizer), **settings)


def test_control_tokens_are_ours_alone(chat_endpoint: tuple[Endpoint, str], tokenizer: Path) -> None:
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token

    async def work(engine: OpenAIEngine) -> None:
        assert len(engine.encode(end)) == 1
        content = engine.encode_content(end)
        assert len(content) > 1
        assert engine.decode(content) == end

    with_engine(chat_endpoint[1], work, tokenizer=str(tokenizer))


def test_it_scores_and_samples_as_the_model_itself(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)

    async def work(engine: OpenAIEngine) -> tuple[list[list[float]], list[int], list[int]]:
        assert (engine.has_tokenizer, engine.has_chat_template, engine.can_score) == (True, False, True)
        with pytest.raises(EngineError, match="has no chat template"):
            engine.render_chat("So?")
        moon, sun = engine.encode(" moon"), engine.encode(" sun")
        return await engine.score(engine.encode("The"), [" moon", sun]), moon, sun

    with running(build_app(make_settings(tiny_model, tmp_path), SECRETS)) as url:
        scores, moon, sun = with_engine(url, work, tokenizer=str(tiny_model))
    prompt = AutoTokenizer.from_pretrained(tiny_model)("The", add_special_tokens=False)["input_ids"]
    check_scores(tiny_model, prompt, [moon, sun], scores)


def test_a_tokenizer_that_is_not_there_stops_the_start(chat_endpoint: tuple[Endpoint, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"engine\.tokenizer = .* has no tokenizer that can be loaded"):
        with_engine(chat_endpoint[1], lambda engine: engine.score("a", ["b"]), tokenizer=str(tmp_path))
