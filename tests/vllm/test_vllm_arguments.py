"""Engine arguments, and speculative decoding on its own real engine core."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.engine.base import Sampling
from services.engine.vllm.arguments import Arguments
from services.engine.vllm.engine import VllmEngine
from shared import metrics
from shared.engine_settings import EngineSettings
from shared.errors import PromptError, SettingsError
from tests.vllm import reference
from tests.vllm.subjects import Subject, vllm_subject

REPEATED = [11, 12, 13, 14, 15, 16, 17] * 8


def build(model: Path, **settings: Any) -> Any:
    made = EngineSettings.model_validate({"kind": "vllm", "model": str(model)} | settings)
    return Arguments(made, (), "", on_cpu=True).build()


def test_what_is_not_set_is_left_to_vllm_and_the_rest_is_passed_through(model: Path) -> None:
    made = build(model, engine_arguments={"seed": 5}, max_num_seqs=7)
    assert (made.seed, made.max_num_seqs, made.max_num_batched_tokens) == (5, 7, None)
    assert made.speculative_config is None
    assert build(model, ngram_tokens=5).speculative_config["num_speculative_tokens"] == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quantisation": "fp8", "zoom": 1}, "knows no quantisation, zoom"),
        ({"max_num_seqs": 3}, r"max_num_seqs \(set engine.max_num_seqs instead\)"),
        ({"enable_lora": True}, r"enable_lora \(set lora_adapter instead\)"),
        ({"enable_prefix_caching": False}, "Headwater sets enable_prefix_caching itself"),
    ],
)
def test_arguments_that_are_unknown_or_ours_are_refused(model: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        build(model, engine_arguments=arguments)


def test_without_sizes_vllm_takes_those_of_its_server(vllm_engine: Subject) -> None:
    assert isinstance(vllm_engine.engine, VllmEngine)
    scheduler = vllm_engine.engine._core._llm.vllm_config.scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (128, 2048)  # on a CPU


@pytest.fixture(scope="module")
def guessing(model: Path) -> Iterator[Subject]:
    with vllm_subject(model, ngram_tokens=4) as subject:
        yield subject


def guessed() -> list[float]:
    """Tokens guessed so far, and those that were right."""
    names = (f"headwater_engine_{name}_tokens_total" for name in ("guessed", "accepted"))
    return [metrics.REGISTRY.get_sample_value(name) or 0.0 for name in names]


def test_guessed_tokens_change_no_greedy_answer(guessing: Subject) -> None:
    prompts = [REPEATED[: n + 20] for n in range(12)] + [[5, 6, 7]]
    before = guessed()
    answers = guessing.do(guessing.engine.generate(prompts, Sampling(max_tokens=40, temperature=0)))
    expected = [reference.greedy(guessing.model, prompt, 40) for prompt in prompts]
    assert [of_prompt[0].token_ids for of_prompt in answers] == expected
    assert guessed()[0] > before[0]
    assert guessed()[1] > before[1]


def test_guesses_and_log_probs_exclude_each_other(guessing: Subject) -> None:
    assert not guessing.engine.can_score
    assert not guessing.engine.can_grade
    with pytest.raises(PromptError, match=r"set engine\.ngram_tokens to 0"):
        guessing.do(guessing.engine.score(REPEATED, [[1]]))
    sampling = Sampling(max_tokens=8, words=("A", "B"))
    ((answer,),) = guessing.do(guessing.engine.generate([REPEATED], sampling))
    assert answer.word_odds == ()
