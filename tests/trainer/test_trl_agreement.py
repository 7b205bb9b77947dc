"""TRL 1.16's DPOTrainer as an independent witness: its loss and gradients on our token ids.

Two of its losses go beyond one pair: `aot` sorts over the batch and `sft` averages over the tokens of the batch. They
get one pair a batch, where they are conservative DPO and the NLL per token of a suffix.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from tests.trainer.conftest import tiny_llama
from tests.trainer.windows import plain_window
from trainer.layouts.base import Layout, WindowPairs
from trainer.layouts.merged import Merged
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.log_probs import SuffixLogProbs
from trainer.losses import Dpo
from trainer.preferences import select_pairs

BETA = 0.3
LAYOUTS: list[Layout] = [SeparateLayout(), TreeLayout(Merged())]
MakeTrl = Callable[..., Any]


@pytest.fixture
def make_trl(policy_folder: Path, tmp_path: Path) -> MakeTrl:
    def make(**options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports and deprecations are not ours to mend
            from datasets import Dataset
            from trl import DPOConfig, DPOTrainer

            tokenizer = AutoTokenizer.from_pretrained(policy_folder, pad_token="w0", eos_token="w0")
            places = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "bf16": False}
            rows = Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}])
            return DPOTrainer(
                tiny_llama(0),
                tiny_llama(1),
                args=DPOConfig(beta=BETA, **places, **options),
                train_dataset=rows,
                processing_class=tokenizer,
            )

    return make


def some_pairs() -> WindowPairs:
    """Prefixes of 4 to 20 tokens, suffixes of 1 to 4."""
    return select_pairs(plain_window(3, num_chunks=5), "dpo", min_reward_gap=0.0, seed=0).pairs


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize(
    ("loss", "options", "batch_size"),
    [
        (Dpo(BETA), {}, 5),
        (Dpo(BETA, form="ipo"), {"loss_type": "ipo"}, 5),
        (Dpo(BETA, length_normalised=True), {"loss_type": "sigmoid_norm"}, 5),
        (Dpo(BETA, label_smoothing=0.2), {"loss_type": "aot", "label_smoothing": 0.2}, 1),
        (Dpo(BETA, nll_weight=0.7), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}, 1),
    ],
    ids=["sigmoid", "ipo", "length_normalised", "label_smoothing", "nll_weight"],
)
def test_loss_and_gradients_are_those_of_trl(
    make_trl: MakeTrl, loss: Dpo, options: dict[str, Any], batch_size: int, layout: Layout
) -> None:
    model, trl = tiny_llama(0), make_trl(**options)
    assert our_loss(loss, model, layout) == pytest.approx(loss_of(trl, batch_size), rel=1e-5)
    for mine, theirs in zip(model.parameters(), trl.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def our_loss(loss: Dpo, model: PreTrainedModel, layout: Layout) -> float:
    """With its backward pass, in several passes."""
    pairs, reference = some_pairs(), tiny_llama(1)
    for each in (model, reference):
        each.set_attn_implementation(layout.attention_implementation)
    (plans,), total = layout.plan([pairs], max_tokens=30), 0.0
    assert len(plans) > 1
    for plan in plans:
        one = layout.lay_out(plan, device=torch.device("cpu"))
        with torch.no_grad():
            fixed = SuffixLogProbs(reference)(one)
        part = loss.terms(SuffixLogProbs(model)(one), fixed, one.num_targets).loss_sum / loss.normaliser(pairs)
        part.backward()  # type: ignore[no-untyped-call]
        total += part.item()
    return total


def loss_of(trl: Any, batch_size: int) -> float:
    """The mean over the batches of the five pairs, with its backward pass."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, map(list, (one.trunk[: one.start], *one.suffixes)), strict=True)) for one in some_pairs()]
    batches = [rows[begin : begin + batch_size] for begin in range(0, len(rows), batch_size)]
    total = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            part = trl.compute_loss(trl.model, trl.data_collator(batch)) / len(batches)
            part.backward()
            total += part.item()
    return total
