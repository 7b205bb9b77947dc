"""The policy under training and its frozen reference. Built by the assembly, used by the loop.

Both are called through SuffixLogProbs: `policy.log_probs(one_pass)`. Both run in evaluation mode: without dropout, an
equal policy and reference have equal log-probs. How they lie on many ranks is in sharding.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from shared.errors import SettingsError, TrainingError
from shared.settings import Settings
from trainer.log_probs import SuffixLogProbs, output_head
from trainer.ranks import Ranks
from trainer.sharding import Precision, copy_weights, distribute, layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Policy:
    log_probs: SuffixLogProbs
    tokenizer: PreTrainedTokenizerBase | None
    """Only saved with checkpoints: None on other ranks than 0."""
    reference_log_probs: SuffixLogProbs | None
    """DPO only."""
    reference_step: int = 0
    """The step after which the reference was copied; 0: it is the model that the run began with."""
    compute_dtype: torch.dtype = torch.float32
    """Of forward and backward of both."""

    @property
    def model(self) -> PreTrainedModel:
        return self.log_probs.model

    @property
    def reference(self) -> PreTrainedModel | None:
        return self.reference_log_probs.model if self.reference_log_probs is not None else None

    def refresh_reference(self, step: int) -> None:
        """The reference becomes the policy as it is after `step`."""
        if self.reference is not None:
            copy_weights(self.model, self.reference)
            self.reference_step = step


def load_policy(
    settings: Settings,
    checkpoint: Path | None,
    *,
    with_reference: bool,
    reference_step: int = 0,
    ranks: Ranks,
) -> Policy:
    """The configured policy, or that of the folder `checkpoint`; all ranks call it together. Raises SettingsError or
    TrainingError, the same on every rank, if it can't be loaded."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write between the JSON logs
    if ranks.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    policy, reference = _precisions(settings, ranks.device)
    folder = checkpoint / "policy" if checkpoint else None
    model = _load(settings, folder, policy, frozen=False, ranks=ranks)
    frozen = None
    if with_reference:
        kept = checkpoint / "reference" if checkpoint and reference_step else None
        frozen = _load(settings, kept, reference, frozen=True, ranks=ranks)
    tokenizer = ranks.only_on_main(lambda: _load_tokenizer(settings))
    return Policy(model, tokenizer, frozen, reference_step, policy.compute)


def _precisions(settings: Settings, device: torch.device) -> tuple[Precision, Precision]:
    """Of the policy and of its reference. Both compute alike: they begin with a margin of zero."""
    usual = "bfloat16" if device.type == "cuda" else settings.policy.dtype
    compute, reference = settings.trainer.compute_dtype, settings.trainer.reference_dtype
    compute = usual if compute == "auto" else compute
    reference = compute if reference == "auto" else reference
    return (
        Precision(DTYPES[settings.policy.dtype], DTYPES[compute]),
        Precision(DTYPES[reference], DTYPES[compute]),
    )


def _load(
    settings: Settings, folder: Path | None, precision: Precision, *, frozen: bool, ranks: Ranks
) -> SuffixLogProbs:
    """From `folder`; None: the model that the run begins with."""
    recompute = settings.trainer.activation_checkpointing and not frozen
    source = str(folder or settings.policy.model)
    whole = ranks.only_on_main(lambda: _load_whole(source, precision.weights, recompute=recompute))
    model = distribute(whole, ranks=ranks, precision=precision, frozen=frozen, compile=settings.trainer.compile)
    if recompute:
        _checkpoint_activations(model.model)
    return model


def _load_whole(source: str, dtype: torch.dtype, *, recompute: bool) -> PreTrainedModel:
    """On the CPU, and checked. The layout exchanges its attention later (layouts/trial.py)."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.model: {source} can't be loaded: {exc}") from exc
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    _check_head(model)
    if recompute:
        _check_dropout(model)
    return model


def _load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    source = settings.policy.tokenizer_source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.tokenizer: {source} can't be loaded: {exc}") from exc
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. Only the layers' own flags are set to training: dropout stays off."""
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as exc:
        raise TrainingError(f"trainer.activation_checkpointing: {exc}; set it to false for this model") from exc
    for layer in layers(model):
        layer.training = True


@torch.no_grad()
def _check_dropout(model: PreTrainedModel) -> None:
    """Raises TrainingError if the layers' flags alone bring dropout on, as in OPT, XGLM and BioGPT."""
    ids = _few_tokens(model)
    without = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    _checkpoint_activations(model)
    if not torch.equal(model.base_model(input_ids=ids, use_cache=False).last_hidden_state, without):
        raise TrainingError(
            f"trainer.activation_checkpointing would bring dropout on in {type(model).__name__}: set it to false, or "
            "dropout to 0 in the model's config.json"
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raises TrainingError if the model changes its logits after the head (soft-capping, scaling, a bias): the trainer
    applies the head itself, to the hidden states of suffix tokens only."""
    ids = _few_tokens(model)
    by_hand = output_head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(by_hand, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        raise TrainingError(f"{type(model).__name__} changes its logits after the head: not supported by the trainer")


def _few_tokens(model: PreTrainedModel) -> Tensor:
    return torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
