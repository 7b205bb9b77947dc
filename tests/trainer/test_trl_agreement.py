"""TRL 1.16's DPOTrainer as an independent witness: its loss and gradients on our token ids."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.trainer.conftest import tiny_llama
from tests.trainer.layouts.windows import CPU, some_pairs
from trainer.layouts.base import Layout
from trainer.layouts.merged import Merged
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.log_probs import SuffixLogProbs
from trainer.losses import Dpo

BETA = 0.3


@pytest.fixture
def trl_trainer(policy_folder: Path, tmp_path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports and deprecations are not ours to mend
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        tokenizer = AutoTokenizer.from_pretrained(policy_folder, pad_token="w0", eos_token="w0")
        arguments = DPOConfig(output_dir=str(tmp_path), beta=BETA, report_to=[], use_cpu=True, bf16=False)
        rows = Dataset.from_list([{"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}])
        model, reference = tiny_llama(0), tiny_llama(1)
        return DPOTrainer(model, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("layout", [SeparateLayout(), TreeLayout(Merged())])
def test_loss_and_gradients_are_those_of_trl(trl_trainer: Any, layout: Layout) -> None:
    pairs, model, reference = some_pairs(), tiny_llama(0), tiny_llama(1)
    for each in (model, reference):
        each.set_attn_implementation(layout.attention_implementation)
    ours = 0.0
    for plan in layout.plan([pairs], max_tokens=40)[0]:
        one = layout.lay_out(plan, device=CPU)
        with torch.no_grad():
            fixed = SuffixLogProbs(reference)(one)
        part = Dpo(BETA).terms(SuffixLogProbs(model)(one), fixed).loss_sum / len(pairs)
        part.backward()  # type: ignore[no-untyped-call]
        ours += part.item()
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, map(list, (one.trunk[: one.start], *one.suffixes)), strict=True)) for one in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = trl_trainer.compute_loss(trl_trainer.model, trl_trainer.data_collator(rows))
        loss.backward()
    assert loss.item() == pytest.approx(ours, rel=1e-5)
    for mine, theirs in zip(model.parameters(), trl_trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
