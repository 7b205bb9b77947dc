import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import tiny_llama
from tests.trainer.windows import candidate, plain_window
from trainer.batches import micro_batches, sequence_batch, suffix_log_probs
from trainer.preferences import Preference, select_pairs

CPU = torch.device("cpu")


def some_pairs() -> list[Preference]:
    """Prefixes of 4 to 20 tokens, suffixes of 1 to 4."""
    window = plain_window(3, num_chunks=5)
    return list(select_pairs(window, "dpo", min_reward_gap=0.0, seed=0).pairs)


def plain_log_prob(model: torch.nn.Module, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> Tensor:
    """One sequence by itself through the model's whole forward."""
    logits = model(torch.tensor([[*prefix, *suffix]])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prefix) + i - 1, token] for i, token in enumerate(suffix)]).sum()


@pytest.mark.parametrize("tie", [True, False])
def test_log_probs_and_gradients_are_those_of_each_sequence_by_itself(tie: bool) -> None:
    batched, plain, pairs = tiny_llama(tie=tie), tiny_llama(tie=tie), some_pairs()
    found = suffix_log_probs(batched, sequence_batch(pairs, device=CPU))
    by_hand = [plain_log_prob(plain, one.trunk[: one.start], one.suffixes[side]) for side in (0, 1) for one in pairs]
    torch.testing.assert_close(found, torch.stack(by_hand), rtol=1e-5, atol=1e-5)
    for log_probs in (found, torch.stack(by_hand)):
        log_probs.sum().backward()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(batched.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_log_probs_are_summed_in_single_precision() -> None:
    model = tiny_llama().to(torch.bfloat16)  # type: ignore[arg-type]
    assert suffix_log_probs(model, sequence_batch(some_pairs(), device=CPU)).dtype == torch.float32


def test_micro_batches_stay_within_their_tokens_and_keep_every_pair_and_a_longer_pair_is_one_by_itself() -> None:
    batches = list(micro_batches(some_pairs() * 3, 100, device=CPU))
    assert all(batch.input_ids.numel() <= 100 for batch in batches)
    assert sum(batch.num_pairs for batch in batches) == 15
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    assert [batch.num_pairs for batch in micro_batches(some_pairs(), 1, device=CPU)] == [1] * 5


def test_only_suffix_tokens_are_targets() -> None:
    pair = Preference("0.0.0.0", (1, 2, 3), 2, candidate("original", 7, 8), candidate("rollout", 9), 0)
    batch = sequence_batch([pair], device=CPU)
    assert batch.input_ids.tolist() == [[1, 2, 7, 8], [1, 2, 9, 0]]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.positions.tolist() == [1, 2, 1]
    assert batch.num_targets.tolist() == [2, 1]
