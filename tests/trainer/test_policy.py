import math

import pytest
import torch
from transformers import LlamaForCausalLM

from shared.settings import TrainerSettings
from tests.trainer.conftest import tiny_llama
from trainer.optimizer import PolicyOptimizer, learning_rate

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
