import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from shared.errors import TrainingError
from shared.settings import Settings, TrainerSettings
from tests.trainer.conftest import tiny_llama
from trainer.optimizer import PolicyOptimizer, learning_rate
from trainer.policy import load_policy
from trainer.ranks import Ranks
from trainer.sharding import local

SETTINGS = TrainerSettings(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate_ratio=0.1)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(1, 0.1), (5, 0.5), (10, 1.0), (35, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2), (60, 0.55), (110, 0.1)],
)
def test_warm_up_is_linear_and_then_a_cosine_falls_to_its_floor(step: int, rate: float) -> None:
    assert learning_rate(step, SETTINGS) == pytest.approx(rate)


def test_without_warm_up_the_first_step_is_on_the_cosine_and_one_longer_than_the_run_never_divides_by_zero() -> None:
    settings = TrainerSettings(steps=2, warmup_steps=0, learning_rate=1.0, min_learning_rate_ratio=0.0)
    assert [learning_rate(step, settings) for step in (1, 2)] == pytest.approx([0.5, 0.0])
    assert learning_rate(3, TrainerSettings(steps=3, warmup_steps=100, learning_rate=1.0)) == pytest.approx(0.03)


def step_with_gradient(model: LlamaForCausalLM, optimizer: PolicyOptimizer, step: int, *, gradient: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step(step)


def test_the_first_adam_step_moves_each_weight_by_the_learning_rate() -> None:
    model, before = tiny_llama(), tiny_llama()
    optimizer = PolicyOptimizer(model, TrainerSettings(warmup_steps=0, steps=10**9, learning_rate=0.01))
    step_with_gradient(model, optimizer, 1, gradient=3.0)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 0.01), rtol=1e-3, atol=1e-6)


def test_weight_decay_leaves_norms_alone() -> None:
    model, before = tiny_llama(), tiny_llama().state_dict()
    optimizer = PolicyOptimizer(model, TrainerSettings(weight_decay=0.1, warmup_steps=0, learning_rate=0.1))
    step_with_gradient(model, optimizer, 1, gradient=0.0)
    after = model.state_dict()
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    torch.testing.assert_close(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"] * 0.99)


def test_clipping_returns_the_norm_before_and_leaves_the_bound_after() -> None:
    model = tiny_llama()
    optimizer = PolicyOptimizer(model, TrainerSettings(max_grad_norm=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    assert optimizer.clip() == pytest.approx(0.1 * math.sqrt(model.num_parameters()), rel=1e-4)
    assert optimizer.clip() == pytest.approx(0.5, rel=1e-4)


def test_the_state_round_trip_continues_exactly() -> None:
    settings = TrainerSettings(warmup_steps=0, learning_rate=0.01)
    model, resumed = tiny_llama(), tiny_llama()
    optimizer, other = PolicyOptimizer(model, settings), PolicyOptimizer(resumed, settings)
    step_with_gradient(model, optimizer, 1, gradient=0.5)
    resumed.load_state_dict(model.state_dict())
    other.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    step_with_gradient(model, optimizer, 2, gradient=1.0)
    step_with_gradient(resumed, other, 2, gradient=1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_activation_checkpointing_is_refused_where_it_would_bring_dropout_on(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    OPTForCausalLM(OPTConfig(**shape, word_embed_proj_dim=16, dropout=0.1)).save_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    given = {"device": "cpu", "activation_checkpointing": True}
    settings = Settings.model_validate({"policy": {"model": str(tmp_path)}, "trainer": given})
    with pytest.raises(TrainingError, match="would bring dropout on in OPTForCausalLM"):
        load_policy(settings, None, with_reference=False, ranks=Ranks.join("cpu", {}))


def test_a_refreshed_reference_is_the_policy_rounded_to_its_own_dtype(policy_folder: Path) -> None:
    given = {"device": "cpu", "compute_dtype": "float32", "reference_dtype": "bfloat16"}
    settings = Settings.model_validate({"policy": {"model": str(policy_folder)}, "trainer": given})
    policy = load_policy(settings, None, with_reference=True, ranks=Ranks.join("cpu", {}))
    assert policy.reference is not None
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    policy.refresh_reference(7)
    for one, other in zip(policy.model.parameters(), policy.reference.parameters(), strict=True):
        assert not other.requires_grad
        assert torch.equal(one.detach().to(torch.bfloat16), local(other.detach()))
