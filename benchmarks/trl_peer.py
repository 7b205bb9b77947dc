"""TRL's DPOTrainer as the peer of benchmarks/trainer.py: `training_step` on our token ids.

TRL re-tokenises its data set and appends an EOS, so the ids go straight to its collator. Reference log-probs are
computed in the step, as ours are. The fused head of TRL 1.16 scores only the rows that predict suffix tokens where
Triton runs, and every row elsewhere; with `suffix_rows` it does so on a CPU too, by the switch that it reads for this
alone.
"""

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

import starter
from trainer.preferences import Preference


class TrlPeer:
    def __init__(
        self, policy: PreTrainedModel, reference: PreTrainedModel, *, beta: float, suffix_rows: bool, bf16: bool
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headwater-trl-")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._trainer = _build(policy, reference, beta=beta, bf16=bf16, folder=self._folder.name)
        if suffix_rows:
            import trl.trainer.utils

            trl.trainer.utils._use_triton = _always
        self.model = cast(nn.Module, self._trainer.accelerator.prepare_model(self._trainer.model))  # as `train` does

    def training_step(self, pairs: Sequence[Preference], *, num_step_pairs: int) -> tuple[float, int]:
        """Gradients of these pairs' share of a step; their share of its loss, and the tokens of the batch."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [dict(zip(names, map(list, (one.trunk[: one.start], *one.suffixes)), strict=True)) for one in pairs]
        batch = self._trainer.data_collator(rows)
        self._trainer.current_gradient_accumulation_steps = num_step_pairs / len(pairs)
        loss = self._trainer.training_step(self.model, batch)
        return float(loss), batch["input_ids"].numel()


def _always(_device: torch.device) -> bool:
    return True


def _build(policy: PreTrainedModel, reference: PreTrainedModel, *, beta: float, bf16: bool, folder: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=folder,
        beta=beta,
        bf16=bf16,
        use_cpu=policy.device.type == "cpu",
        max_length=None,
        gradient_checkpointing=False,
        precompute_ref_log_probs=False,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(Path(starter.__file__).parent / "models" / "policy")
    words = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])  # it wants some; none is trained
    return DPOTrainer(policy, reference, args=arguments, train_dataset=words, processing_class=tokenizer)
