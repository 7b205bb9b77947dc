"""The recipe's parts: the optimiser, the loop's restart, sampling, pairs, and a whole make on next to nothing."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from starter.checker import Finding, Verdict
from starter.drift import choose_pair, dpo_loss
from starter.fitting import IGNORE, Row, Stage, Tagger, collate, fit
from starter.lessons import Candidate, Group
from starter.make import make
from starter.model import build_llama
from starter.optim import orthogonalise
from starter.sampling import generate, score_labels
from starter.stages import STAGES, Budget, order_reward
from starter.tokenizer import build_tokenizer
from starter.world import World


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(World(0))


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_llama(tokenizer, num_layers=1, seed=3)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(2, 24, 8)))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


def test_rows_are_padded_on_the_right_and_ignored_there() -> None:
    ids, labels, tags = collate([Row([5, 6, 7], {2: 9}, {1: 4}), Row([8], {})], "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert labels.tolist() == [[IGNORE, IGNORE, 9], [IGNORE] * 3]
    assert tags.tolist() == [[IGNORE, 4, IGNORE], [IGNORE] * 3]


def test_a_broken_off_stage_goes_on_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starter.fitting.CHECKPOINT_EVERY_S", 0.0)
    whole = _fit_some(tokenizer, tmp_path / "whole", stop_at=None)
    with pytest.raises(InterruptedError):
        _fit_some(tokenizer, tmp_path / "broken", stop_at=3)
    resumed = _fit_some(tokenizer, tmp_path / "broken", stop_at=None)
    assert torch.equal(whole, resumed)


def test_padding_changes_neither_greedy_answers_nor_label_scores(model: LlamaForCausalLM) -> None:
    short, long = [5, 6, 7], list(range(5, 40))
    together = generate(model, [long, short], max_tokens=6, eos_id=2, pad_id=0)
    alone = [generate(model, [one], max_tokens=6, eos_id=2, pad_id=0)[0] for one in (long, short)]
    assert together == alone
    both = score_labels(model, [long, short], [10, 11], pad_id=0)
    single = score_labels(model, [short], [10, 11], pad_id=0)
    assert both[1] == pytest.approx(single[0], abs=1e-5)
    assert sum(both[0]) == pytest.approx(1.0)


def test_the_checkers_order_gives_a_win_for_each_worse_candidate_and_half_for_ties() -> None:
    group = _group([(), ("unsafe",), ("unsafe",), ("correct",)])
    assert [order_reward(group, index) for index in range(4)] == [2.5, 1.0, 1.0, 3.5]


def test_the_best_and_worst_candidates_make_the_pair() -> None:
    group = _group([(), (), ()])
    assert choose_pair(group, [0.3, 0.9, 0.1], 0) == ([7], [11], [12])
    assert choose_pair(group, [0.5, 0.5, 0.5], 0) is None


def test_dpo_loss_of_an_unmoved_policy_is_ln_two(model: LlamaForCausalLM) -> None:
    loss = dpo_loss(model, model, [([5, 6], [7, 8], [9])], beta=0.1)
    assert loss.detach().item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_a_make_on_next_to_nothing_goes_through_for_another_world(tmp_path: Path) -> None:
    figures = make(
        tmp_path / "models", seed=1, work=tmp_path / "work", budget=Budget().scaled(0.002), stages=list(STAGES)
    )
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
    tagger = Tagger(model.config.hidden_size)
    fit(Stage("some", 6, 1e-3, batch), model, tagger, folder=folder, tell=lambda line: None)
    return torch.as_tensor(model.model.embed_tokens.weight).detach()


def _group(kinds: Sequence[tuple[str, ...]]) -> Group:
    verdicts = [Verdict(tuple(Finding(kind, 0) for kind in each), 1) for each in kinds]  # type: ignore[arg-type]
    return Group([7], [Candidate([10 + place], verdict) for place, verdict in enumerate(verdicts)])
