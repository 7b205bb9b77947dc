import logging
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from shared.errors import SettingsError
from shared.settings import TrainerSettings
from tests.trainer.layouts.windows import CPU, some_pairs, the_only_pass
from trainer.layouts.base import Layout
from trainer.layouts.flex import Flex
from trainer.layouts.kernels import Dense
from trainer.layouts.merged import Merged
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.layouts.trial import choose_kernel, choose_layout
from trainer.log_probs import SuffixLogProbs

SHAPE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**SHAPE | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def chosen(model: PreTrainedModel, **settings: Any) -> Layout:
    return choose_layout([SuffixLogProbs(model)], TrainerSettings(**settings), device=CPU, compute_dtype=torch.float32)


FITTING = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": None}, "Olmo": {}, "Olmo2": {},
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("attention", ["merged", "dense"])
def test_a_tree_fits(name: str, attention: str) -> None:
    model = tiny(name, **FITTING[name])
    separate = SuffixLogProbs(model)(the_only_pass(SeparateLayout(), some_pairs()))
    layout = chosen(model, layout="tree", attention=attention)
    assert isinstance(layout, TreeLayout)
    found = SuffixLogProbs(model)(the_only_pass(layout, some_pairs()))
    torch.testing.assert_close(found.sort().values, separate.sort().values, rtol=1e-6, atol=1e-5)


REFUSED = [
    ("Mistral", {"sliding_window": 8}, "a sliding window of 8 tokens"),
    ("Gemma2", {"sliding_window": 8}, "layers of type sliding_attention"),
    ("Gemma3", {"sliding_window": 8}, "layers of type sliding_attention"),
    ("Mamba", {"state_size": 4}, "a state from token to token"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_a_tree_would_get_wrong_is_refused_by_name(
    name: str, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(name, **changes)
    with pytest.raises(SettingsError, match=f"{name}ForCausalLM .*{reason}"):
        chosen(model, layout="tree")
    assert isinstance(chosen(model, layout="auto"), SeparateLayout)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert reason in warning.getMessage()
    log_probs = SuffixLogProbs(model)(the_only_pass(SeparateLayout(), some_pairs()))
    assert torch.isfinite(log_probs).all()


def test_a_model_that_looks_at_the_place_in_the_row_is_caught_by_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("Llama")
    table = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))

    def add_place(_module: torch.nn.Module, _inputs: Any, found: torch.Tensor) -> torch.Tensor:
        return found + table[: found.shape[1]]

    model.get_input_embeddings().register_forward_hook(add_place)
    with pytest.raises(SettingsError, match=r"by .* nats a token, allowed are 0\.0001"):
        chosen(model, layout="tree")
    assert isinstance(chosen(model, layout="auto"), SeparateLayout)
    assert "nats a token" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_dropout_that_stays_on_is_named() -> None:
    model = tiny("Llama")
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, found: torch.dropout(found, 0.5, True))
    with pytest.raises(SettingsError, match="dropout that can't be switched off"):
        chosen(model, layout="tree")


def test_the_kernel_follows_the_device() -> None:
    cuda = torch.device("cuda")
    assert isinstance(choose_kernel(TrainerSettings(), CPU), Merged)
    assert isinstance(choose_kernel(TrainerSettings(), cuda), Flex)
    assert isinstance(choose_kernel(TrainerSettings(attention="dense"), cuda), Dense)
    for name, device in (("flex", CPU), ("merged", cuda)):
        with pytest.raises(SettingsError, match=f"'{name}' does not run on {device.type}"):
            choose_kernel(TrainerSettings.model_validate({"attention": name}), device)
