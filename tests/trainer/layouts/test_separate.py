import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import tiny_llama
from tests.trainer.layouts.windows import CPU, some_pairs, the_only_pass
from tests.trainer.windows import candidate
from trainer.layouts.base import PassPlan
from trainer.layouts.separate import SeparateLayout
from trainer.log_probs import SuffixLogProbs
from trainer.preferences import Preference


def plain_log_prob(model: torch.nn.Module, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Tensor:
    """One sequence by itself through the model's whole forward."""
    logits = model(torch.tensor([[*prefix, *suffix]])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prefix) + i - 1, token] for i, token in enumerate(suffix)]).sum()


@pytest.mark.parametrize("tie", [True, False])
def test_log_probs_and_gradients_are_those_of_each_sequence_by_itself(tie: bool) -> None:
    batched, plain, pairs = tiny_llama(tie=tie), tiny_llama(tie=tie), some_pairs()
    found = SuffixLogProbs(batched)(SeparateLayout().lay_out(PassPlan((pairs,)), device=CPU))
    by_hand = [plain_log_prob(plain, one.trunk[: one.start], one.suffixes[side]) for side in (0, 1) for one in pairs]
    torch.testing.assert_close(found, torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    for log_probs in (found, torch.stack(by_hand)):
        log_probs.sum().backward()
    for ours, theirs in zip(batched.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_log_probs_are_summed_in_single_precision() -> None:
    model = tiny_llama().to(torch.bfloat16)  # type: ignore[arg-type]
    assert SuffixLogProbs(model)(the_only_pass(SeparateLayout(), some_pairs())).dtype == torch.float32


def test_only_suffix_tokens_are_targets() -> None:
    pair = Preference("0.0.0.0", (1, 2, 3), 2, candidate("original", 7, 8), candidate("rollout", 9))
    one = the_only_pass(SeparateLayout(), (pair,))
    assert one.input_ids.tolist() == [[1, 2, 7, 8], [1, 2, 9, 0]]
    assert one.targets.tolist() == [7, 8, 9]
    assert one.rows.tolist() == [1, 2, 5]
    assert one.suffixes.tolist() == [0, 0, 1]
    assert one.num_targets.tolist() == [2, 1]
    assert (one.num_tokens, one.num_separate_tokens) == (8, 7)
