"""The tree against separate sequences: equal to single-precision noise."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from shared.objectives import OBJECTIVES
from tests.tiny_llama import tiny_llama
from tests.trainer.layouts.windows import CPU, pair, some_pairs, the_only_pass
from trainer.layouts.base import Layout, WindowPairs
from trainer.layouts.kernels import Dense, Kernel
from trainer.layouts.merged import Merged, is_exact
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.log_probs import SuffixLogProbs

KERNELS: list[Kernel] = [Dense(), Merged()]
VOCABULARY = 32
TRUNK = tuple(1 + (5 * i) % 31 for i in range(40))
Windows = Sequence[WindowPairs]


def grouped_query_model(**shape: Any) -> LlamaForCausalLM:
    """Four query heads over two key heads, weights not tied."""
    return tiny_llama(VOCABULARY, tie_word_embeddings=False, **shape)


def scored(
    model: PreTrainedModel, layout: Layout, windows: Windows, *, max_tokens: int = 10_000
) -> tuple[Tensor, Tensor]:
    """Log-probs by window, start and side, and the gradient of a loss that weighs each suffix differently."""
    model.set_attn_implementation(layout.attention_implementation)
    model.zero_grad()
    found: dict[tuple[str, int, int], float] = {}
    for plan in layout.plan(windows, max_tokens=max_tokens)[0]:
        log_probs = SuffixLogProbs(model)(layout.lay_out(plan, device=CPU))
        names = [(one.window_id, one.start, side) for side in range(len(plan.pairs[0].suffixes)) for one in plan.pairs]
        weights = [1 + start % 7 / 10 + side / 3 for _, start, side in names]  # none cancels another
        (log_probs * torch.tensor(weights)).sum().backward()
        found |= dict(zip(names, log_probs.tolist(), strict=True))
    gradients = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
    return torch.tensor([found[name] for name in sorted(found)]), torch.cat(gradients)


def assert_equal_to_separate(kernel: Kernel, windows: Windows, *, max_tokens: int = 10_000, **shape: Any) -> None:
    model = grouped_query_model(**shape)
    expected, expected_gradient = scored(model, SeparateLayout(), windows)
    found, gradient = scored(model, TreeLayout(kernel), windows, max_tokens=max_tokens)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    assert (gradient - expected_gradient).norm() <= 5e-5 * expected_gradient.norm()


def test_the_private_kernels_of_torch_are_exact() -> None:
    assert is_exact()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("objective", [*OBJECTIVES])
def test_every_objective(kernel: Kernel, objective: str) -> None:
    assert_equal_to_separate(
        kernel, [some_pairs(objective=objective), some_pairs(5, num_chunks=2, objective=objective)]
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("max_tokens", [10_000, 45, 1])
def test_originals_on_both_sides_short_branches_and_several_windows(kernel: Kernel, max_tokens: int) -> None:
    first = (
        pair(TRUNK, 1, TRUNK[1:9], (3, 3)),
        pair(TRUNK, 9, (4, 5, 6, 7, 8, 9, 10, 11), TRUNK[9:17]),
        pair(TRUNK, 17, (4,), (9, 9, 2, 30, 30, 1, 4, 4)),
        pair(TRUNK, 30, TRUNK[30:33], (*TRUNK[30:40], 2)),
    )
    assert_equal_to_separate(kernel, [first, some_pairs(), some_pairs(6, num_chunks=1)], max_tokens=max_tokens)


def test_activation_checkpointing() -> None:
    windows = [some_pairs(), some_pairs(5)]
    model = grouped_query_model()
    expected = scored(model, SeparateLayout(), windows)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        layer.training = True
    gradient = scored(model, TreeLayout(Merged()), windows)[1]
    assert (gradient - expected).norm() <= 5e-5 * expected.norm()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_document_and_chunking(data: st.DataObject) -> None:
    windows = []
    for number in range(data.draw(st.integers(1, 3))):
        trunk = data.draw(st.lists(st.integers(1, 31), min_size=2, max_size=24).map(tuple))
        starts = data.draw(st.lists(st.integers(1, len(trunk) - 1), min_size=1, unique=True, max_size=6).map(sorted))
        own = [st.just(trunk[start : start + size]) for start in starts for size in (1, 3)]
        suffix = st.lists(st.integers(1, 31), min_size=1, max_size=6).map(tuple)
        sides = [st.one_of(own[2 * index], own[2 * index + 1], suffix) for index in range(len(starts))]
        windows.append(
            tuple(
                pair(trunk, start, data.draw(side), data.draw(side), window=str(number))
                for start, side in zip(starts, sides, strict=True)
            )
        )
    kernel = data.draw(st.sampled_from(KERNELS))
    assert_equal_to_separate(kernel, windows, max_tokens=data.draw(st.sampled_from([1, 30, 1000])))


@pytest.mark.parametrize("kernel", KERNELS)
def test_six_steps_stay_together(kernel: Kernel) -> None:
    weights = []
    for layout in (SeparateLayout(), TreeLayout(kernel)):
        model = grouped_query_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(6):
            scored(model, layout, [some_pairs(2 * step), some_pairs(2 * step + 1, num_chunks=3)], max_tokens=60)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weights.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
    start = torch.cat([one.detach().flatten() for one in grouped_query_model().parameters()])
    assert (weights[0] - weights[1]).norm() <= 1e-4 * (weights[0] - start).norm()


@pytest.mark.parametrize(("length", "ordinary", "tree"), [(512, 2304, 1152), (1024, 8960, 2688), (2048, 34560, 5760)])
def test_tokens_of_a_document(length: int, ordinary: int, tree: int) -> None:
    """Chunks of 128, every one but the first, two branches each."""
    trunk = (1,) * length
    window = tuple(pair(trunk, start, (2,) * 128, (3,) * 128) for start in range(128, length, 128))
    one = the_only_pass(TreeLayout(Dense() if length == 512 else Merged()), window)
    assert (one.num_tokens, one.num_separate_tokens) == (tree, ordinary)


def test_an_original_costs_no_branch() -> None:
    window = (pair(TRUNK, 4, TRUNK[4:8], (1, 1, 1, 1)), pair(TRUNK, 8, (1, 1), TRUNK[8:11]))
    one = the_only_pass(TreeLayout(Merged()), window)
    assert one.num_tokens == 11 + 4 + 2
    assert one.targets.tolist() == [*TRUNK[4:8], 1, 1, 1, 1, 1, 1, *TRUNK[8:11]]
    assert one.rows.tolist() == [3, 4, 5, 6, 7, 15, 3, 11, 12, 13, 7, 8, 9]
    assert one.position_ids is not None
    assert one.position_ids[0].tolist() == [*range(11), 4, 5, 6, 7, 8, 9]


def test_half_precision_keeps_its_dtype_and_stays_close() -> None:
    model = grouped_query_model()
    expected = scored(model, SeparateLayout(), [some_pairs()])[0]
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    found = scored(model, TreeLayout(Merged()), [some_pairs()])[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_autocast_reaches_the_kernel() -> None:
    model = grouped_query_model()
    expected = scored(model, SeparateLayout(), [some_pairs()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored(model, TreeLayout(Merged()), [some_pairs()])
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.1)
    assert 0 < (found[1] - expected[1]).norm() < 0.3 * expected[1].norm()


def test_separate_sequences_need_no_mask_and_the_merged_kernel_gets_none() -> None:
    model = grouped_query_model()
    seen: list[Any] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _module, _args, options: seen.append(options["attention_mask"]), with_kwargs=True
    )
    for layout in (SeparateLayout(), TreeLayout(Merged())):
        scored(model, layout, [some_pairs()])
    assert seen == [None, None]
