import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import TrainingError
from trainer import log_probs
from trainer.log_probs import _token_log_probs, output_head


def scored(head: nn.Linear, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Log-probs of ten rows, and the gradients of hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=generator).requires_grad_()
    targets = torch.randint(24, (10,), generator=generator)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        found = _token_log_probs(head, hidden, targets)
    return [found.detach(), *torch.autograd.grad(found.sin().sum(), [hidden, *head.parameters()])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_head_in_chunks_gives_the_same_log_probs_and_gradients(
    bias: bool, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 24, bias=bias)
    expected = scored(head, dtype=dtype)
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", 3 * 24)
    monkeypatch.setattr(log_probs, "_MIN_ROWS", 1)
    tolerance = 1e-5 if dtype is None else 2e-2
    for ours, theirs in zip(scored(head, dtype=dtype), expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_chunked_head_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", 64)
    monkeypatch.setattr(log_probs, "_MIN_ROWS", 1)
    kept: list[int] = []
    head, hidden = nn.Linear(8, 64, bias=False), torch.randn(100, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        _token_log_probs(head, hidden, torch.zeros(100, dtype=torch.long))
    assert max(kept) == 100 * 8


def test_a_model_without_a_linear_head_is_refused() -> None:
    class Headless:
        def get_output_embeddings(self) -> None: ...

    with pytest.raises(TrainingError, match="Headless has no linear output head"):
        output_head(Headless())  # type: ignore[arg-type]


def test_log_probs_are_those_of_the_softmax() -> None:
    head, hidden = nn.Linear(8, 24, bias=False), torch.randn(3, 8)
    expected = functional.log_softmax(head(hidden), -1)[torch.arange(3), torch.tensor([0, 5, 23])]
    torch.testing.assert_close(_token_log_probs(head, hidden, torch.tensor([0, 5, 23])), expected)
