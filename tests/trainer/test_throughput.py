from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from tests.trainer.conftest import tiny_llama
from tests.trainer.windows import candidate
from trainer.figures import FIGURES
from trainer.layouts.base import Pass, PassPlan
from trainer.layouts.separate import SeparateLayout
from trainer.log_probs import SuffixLogProbs
from trainer.preferences import Preference
from trainer.throughput import ModelFlops, Throughput, Work, peak_flops

CPU = torch.device("cpu")
PAIR = Preference("0.0.0.0", (1, 2, 3), 2, candidate("original", 7, 8), candidate("rollout", 9))


def separate_pass() -> Pass:
    """Rows 1 2 7 8 and 1 2 9 and one of padding."""
    return SeparateLayout().lay_out(PassPlan(((PAIR,),)), device=CPU)


def tree_pass() -> Pass:
    """The trunk 1 2 with the branches 7 8 and 9."""
    return Pass(
        input_ids=torch.tensor([[1, 2, 7, 8, 9]]),
        position_ids=torch.tensor([[0, 1, 2, 3, 2]]),
        rows=torch.tensor([1, 2, 1]),
        targets=torch.tensor([7, 8, 9]),
        suffixes=torch.tensor([0, 0, 1]),
        num_targets=torch.tensor([2, 1]),
        num_separate_tokens=7,
    )


def plain_pass() -> Pass:
    """The separate pass without position ids: each row counts from 0."""
    return replace(separate_pass(), position_ids=None)


def work_of(*passes: Pass) -> Work:
    work = Work()
    for one in passes:
        work.add(one)
    return work


def test_the_work_of_passes_is_added_up() -> None:
    assert work_of(separate_pass()).tensor().tolist() == [8, 7, 3, 2 * (1 + 2 + 3 + 4)]
    assert work_of(plain_pass()).tensor().tolist() == [8, 7, 3, 2 * (1 + 2 + 3 + 4)]
    assert work_of(tree_pass()).tensor().tolist() == [5, 7, 3, 1 + 2 + 3 + 4 + 3]
    assert work_of(separate_pass(), tree_pass()).tensor().tolist() == [13, 14, 6, 33]


def test_the_flops_of_a_forward_pass_are_those_that_torch_counts() -> None:
    model, one = tiny_llama(tie=False), separate_pass()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        SuffixLogProbs(model)(one)
    flops = ModelFlops.of(model)
    assert flops is not None
    # eager attention computes the masked half too: 4 * 4 score pairs a row; torch also counts the rotary angles
    expected = flops.forward(tokens=8, targets=3, score_pairs=2 * 4 * 4)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_the_share_of_saved_tokens_and_the_rates_since_the_step_before() -> None:
    throughput = Throughput(None, None, forwards=4, device=CPU, clock=iter([100.0, 110.0, 112.0]).__next__)
    throughput.figures(work_of(tree_pass()).tensor(), [PAIR], computing_s=1.0)
    figures = throughput.figures(work_of(tree_pass()).tensor(), [PAIR, PAIR, PAIR], computing_s=1.0)
    assert figures["saved_token_share"] == pytest.approx(1 - 5 / 7)
    rates = [figures[f"{name}_per_second"] for name in ("tokens", "pairs", "windows")]
    assert rates == pytest.approx([5 / 2, 3 / 2, 1 / 2])
    assert figures["batch_tokens"] == 5
    assert figures["peak_memory_bytes"] > 50e6  # torch alone is more
    assert figures.keys() <= FIGURES.keys()


def test_mfu_is_absent_without_a_known_gpu() -> None:
    throughput = Throughput.of(tiny_llama(), with_reference=True)
    assert "mfu" not in throughput.figures(work_of(tree_pass()).tensor(), [PAIR], computing_s=1.0)


def test_mfu_is_of_the_seconds_of_computing_and_of_all_gpus() -> None:
    flops = ModelFlops(per_token=100, per_target=10, per_score_pair=1)  # 5 * 100 + 3 * 10 + 13 = 543 a forward pass
    work = work_of(tree_pass()).tensor()
    for forwards in (3, 4):
        throughput = Throughput(flops, peak_flops=10_000, forwards=forwards, device=CPU)
        figures = throughput.figures(work, [PAIR], computing_s=2.0)
        assert figures["mfu"] == pytest.approx(forwards * 543 / 20_000)


def test_a_mixture_of_experts_has_no_flops() -> None:
    config = MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    assert ModelFlops.of(MixtralForCausalLM(config)) is None  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_gpus(name: str, tflops: float) -> None:
    assert peak_flops(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "Tesla T4"]
)
def test_unknown_gpus_and_slices_have_no_peak(name: str) -> None:
    assert peak_flops(name) is None
