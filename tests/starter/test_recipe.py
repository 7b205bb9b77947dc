"""The recipe: prompts, optimiser, resuming, sampling, pairs, and a whole run on a minimal budget."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from services.prompts import Prompt
from starter.checker import Finding, Verdict
from starter.documents import document_of
from starter.model import WordCodec, build_llama
from starter.recipe.__main__ import make
from starter.recipe.drift import checker_rewards, choose_pair, dpo_loss
from starter.recipe.lessons import PROMPTS, Candidate, Group, PromptLayout
from starter.recipe.stages import STAGES, Budget
from starter.recipe.training import IGNORE, NUM_TAGS, Row, Stage, collate, fit, orthogonalise
from starter.sampling import generate, score_labels
from starter.world import World


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_llama(tokenizer, num_layers=1, seed=3)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("rewriter", {"prefix", "suffix"}), ("quality", {"prefix", "a", "b"}), ("safety", {"candidate"}),
        ("factuality", {"prefix", "reference", "candidate"}),
    ],
)  # fmt: skip
def test_a_layout_gives_the_tokens_of_the_prompt_that_services_fill(
    world: World, tokenizer: PreTrainedTokenizerFast, name: str, fields: set[str]
) -> None:
    codec = WordCodec(tokenizer)
    words = document_of(world, "train", 0).words
    ids = {field: codec.ids(words[30 + place : 62 + place]) for place, field in enumerate(sorted(fields))}
    prompt = Prompt.load(PROMPTS / f"{name}.txt", required=fields)
    filled, starts = PromptLayout(name, codec).fill(ids)
    assert filled == tokenizer.encode(prompt.fill({field: codec.decode(own) for field, own in ids.items()}))
    assert {field: filled[start : start + 32] for field, start in starts.items()} == ids
    assert prompt.text.endswith(":"), "the label must follow directly"


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 8)))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_rows_are_padded_on_the_right_and_ignored_there() -> None:
    ids, labels, tags = collate([Row([5, 6, 7], {2: 9}, {1: 4}), Row([8], {})], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[IGNORE, IGNORE, 9], [IGNORE] * 3]
    assert tags.tolist() == [[IGNORE, 4, IGNORE], [IGNORE] * 3]


def test_an_interrupted_stage_resumes_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starter.recipe.training.CHECKPOINT_EVERY_S", 0.0)
    whole = _fit_some(tokenizer, tmp_path / "whole", stop_at=None)
    with pytest.raises(InterruptedError):
        _fit_some(tokenizer, tmp_path / "broken", stop_at=3)
    resumed = _fit_some(tokenizer, tmp_path / "broken", stop_at=None)
    assert torch.equal(whole, resumed)


def test_padding_changes_neither_greedy_answers_nor_label_scores(model: LlamaForCausalLM) -> None:
    short, long = [5, 6, 7], list(range(5, 40))
    together = generate(model, [long, short], max_tokens=6)
    alone = [generate(model, [one], max_tokens=6)[0] for one in (long, short)]
    assert together == alone
    both = score_labels(model, [long, short], [10, 11])
    single = score_labels(model, [short], [10, 11])
    assert both[1] == pytest.approx(single[0], abs=1e-5)
    assert sum(both[0]) == pytest.approx(1.0)


def test_the_checkers_order_gives_a_win_for_each_worse_candidate_and_half_for_ties() -> None:
    group = _group([(), ("unsafe",), ("unsafe",), ("correct",)])
    assert checker_rewards([group]) == [[2.5, 1.0, 1.0, 3.5]]


def test_the_best_and_worst_candidates_make_the_pair() -> None:
    group = _group([(), (), ()])
    assert choose_pair(group, [0.3, 0.9, 0.1], 0) == ([7], [11], [12])
    assert choose_pair(group, [0.5, 0.5, 0.5], 0) is None


def test_dpo_loss_of_an_unmoved_policy_is_ln_two(model: LlamaForCausalLM) -> None:
    loss = dpo_loss(model, model, [([5, 6], [7, 8], [9])])
    assert loss.detach().item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_minimal_budget_makes_the_models_of_another_world(tmp_path: Path) -> None:
    budget = Budget(**dict.fromkeys(vars(Budget()), 1) | {"num_measured": 20})
    figures = make(tmp_path / "models", seed=1, work=tmp_path / "work", budget=budget, stages=STAGES)
    assert (tmp_path / "models" / "measured.json").is_file()
    assert {"rewriter.exact_copies", "judge.pairs_drifted", "policy.all_clean"} <= set(figures)
    for name in ("policy", "rewriter", "judge"):
        assert (tmp_path / "models" / name / "model.safetensors").is_file()


def _fit_some(tokenizer: PreTrainedTokenizerFast, folder: Path, *, stop_at: int | None) -> torch.Tensor:
    def batch(step: int) -> Sequence[Row]:
        if step == stop_at:
            raise InterruptedError
        return [Row([5 + step, 6, 7], {0: 6, 1: 7}, {2: 1})]

    model = build_llama(tokenizer, num_layers=1, seed=3)
    torch.manual_seed(0)
    fit(Stage("some", 6, 1e-3, batch), model, nn.Linear(model.config.hidden_size, NUM_TAGS), folder=folder)
    return torch.as_tensor(model.model.embed_tokens.weight).detach()


def _group(kinds: Sequence[tuple[str, ...]]) -> Group:
    verdicts = [Verdict(tuple(Finding(kind, 0) for kind in each), 1) for each in kinds]  # type: ignore[arg-type]
    return Group([7], [Candidate([10 + place], verdict) for place, verdict in enumerate(verdicts)])
