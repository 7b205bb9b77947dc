"""The policy under training, its frozen reference and its optimizer. Built by the assembly, used by the loop.

Both models run in evaluation mode: without dropout, an equal policy and reference have equal log-probs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from shared.errors import SettingsError, TrainingError
from shared.settings import Settings, TrainerSettings
from trainer.log_probs import output_head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    """Only saved with checkpoints."""
    reference: PreTrainedModel | None
    """DPO only."""
    reference_step: int = 0
    """The step after which the reference was copied; 0: it is the model that the run began with."""

    def refresh_reference(self, step: int) -> None:
        """The reference becomes the policy as it is after `step`."""
        if self.reference is not None:
            self.reference.load_state_dict(self.model.state_dict())
            self.reference_step = step


def load_policy(
    settings: Settings, checkpoint: Path | None, *, with_reference: bool, reference_step: int = 0
) -> Policy:
    """The configured policy, or that of the folder `checkpoint`. Raises SettingsError if it can't be loaded."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write between the JSON logs
    model = _load_model(checkpoint / "policy" if checkpoint else None, settings)
    _check_head(model)
    if settings.trainer.activation_checkpointing:
        _checkpoint_activations(model)
    reference = None
    if with_reference:
        kept = checkpoint / "reference" if checkpoint and reference_step else None
        reference = _load_model(kept, settings).requires_grad_(False)
    source = settings.policy.tokenizer_source
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.tokenizer: {source} can't be loaded: {exc}") from exc
    return Policy(model, tokenizer, reference, reference_step)


def _load_model(folder: Path | None, settings: Settings) -> PreTrainedModel:
    """From `folder`; None: the one that the run begins with."""
    source, device = folder or settings.policy.model, settings.trainer.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(str(source), dtype=DTYPES[settings.policy.dtype])
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.model: {source} can't be loaded: {exc}") from exc
    assert isinstance(model, PreTrainedModel)
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.train(False)
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. Only the layers' own flags are set to training: dropout stays off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raises TrainingError if the model changes its logits after the head (soft-capping, scaling, a bias): the trainer
    applies the head itself, to the hidden states of suffix tokens only."""
    ids = torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    by_hand = output_head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(by_hand, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        raise TrainingError(f"{type(model).__name__} changes its logits after the head: not supported by the trainer")


class PolicyOptimizer:
    """AdamW. Weight decay is applied to matrices only, not to norms and biases."""

    def __init__(self, model: PreTrainedModel, settings: TrainerSettings) -> None:
        self._settings = settings
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.adam_betas, fused=True)

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`; returns their norm before."""
        return torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)

    def step(self, step: int) -> float:
        """Apply update `step` (1 is the first); returns its learning rate."""
        rate = learning_rate(step, self._settings)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        return rate

    def state(self) -> dict[str, Tensor]:
        """`{parameter}.{moment}` -> tensor; empty before the first step."""
        return {
            f"{name}.{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._adam.state
            for moment in _MOMENTS
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `state`. Raises KeyError if moments are missing from non-empty tensors."""
        if not tensors:
            return
        for name, parameter in self._parameters.items():
            moments = {moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS}
            self._adam.state[parameter] = moments


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Linear warm-up, then a cosine that reaches its floor at the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
