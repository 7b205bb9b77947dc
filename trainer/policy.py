"""The policy under training and its reference. Built by the assembly, used by the loop and by checkpoints."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from shared.errors import SettingsError, TrainingError
from shared.settings import PolicySettings, TrainerSettings

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Policy:
    """The model that is trained, its tokenizer (only carried into checkpoints) and the frozen reference."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None
    """DPO only."""
    reference_step: int = 0
    """After which step the reference was copied; 0: it is the model that the run began with."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def refresh_reference(self, step: int) -> None:
        """From now on the reference is the policy as it is after `step`."""
        if self.reference is not None:
            self.reference.load_state_dict(self.model.state_dict())
            self.reference_step = step


def load_policy(
    settings: PolicySettings,
    device: str,
    *,
    with_reference: bool,
    activation_checkpointing: bool,
    checkpoint: Path | None,
    reference_step: int = 0,
) -> Policy:
    """The policy as it was configured, or as `checkpoint` (a checkpoint's folder) left it."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # it would write beside the JSON logs
    where = pick_device(device)
    model = _load_model(str(checkpoint / "policy") if checkpoint else settings.model, settings.dtype, where)
    _check_head(model)
    if activation_checkpointing:
        _checkpoint_activations(model)
    reference = None
    if with_reference:
        kept = checkpoint / "reference" if checkpoint and reference_step else None
        reference = _load_model(str(kept or settings.model), settings.dtype, where).requires_grad_(False)
    return Policy(model, _load_tokenizer(settings.tokenizer_source), reference, reference_step)


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _load_model(source: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """In evaluation mode: dropout would make the policy differ from its equal reference."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=_DTYPES[dtype])
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.model: {source} can't be loaded: {exc}") from exc
    assert isinstance(model, PreTrainedModel)
    model.to(device)  # type: ignore[arg-type]
    model.train(False)
    return model


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise SettingsError(f"policy.tokenizer: {source} can't be loaded: {exc}") from exc
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. Only the layers' own flag turns to training: dropout stays off."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def output_head(model: PreTrainedModel) -> nn.Module:
    """Hidden states -> logits. Raises TrainingError if the model has none."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(head, nn.Module):
        raise TrainingError(f"{type(model).__name__} has no output head: give a causal language model")
    return head


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Raise TrainingError if the model does more to its logits than its head (soft-capping, scaling, a bias of rows).

    The log-probs of suffix tokens are formed from chosen hidden states, which must equal the plain forward.
    """
    ids = torch.arange(8, device=model.device).remainder(model.config.vocab_size).unsqueeze(0)
    by_hand = output_head(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(by_hand, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3):
        raise TrainingError(f"{type(model).__name__} changes its logits after the head: not supported by the trainer")


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(step: int, settings: TrainerSettings) -> float:
    """Of update `step` (1 is the first): linear warm-up, then a cosine that reaches its floor at the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    span = max(1, settings.steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


class PolicyOptimizer:
    """Weight decay falls on matrices only: norms and biases have nothing to shrink towards."""

    def __init__(self, model: PreTrainedModel, settings: TrainerSettings) -> None:
        self._settings = settings
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        others = [p for p in self._parameters.values() if p.ndim < 2]
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            fused=True,
        )

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def clip(self) -> Tensor:
        """Scale the gradients to `max_grad_norm` at most; returns their norm before that."""
        return torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_grad_norm)

    def step(self, step: int) -> float:
        """Apply update `step`; returns its learning rate."""
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
        """The reverse of `state`. Raises KeyError if a parameter's moments are missing from non-empty tensors."""
        if not tensors:
            return
        for name, parameter in self._parameters.items():
            self._adam.state[parameter] = {
                moment: tensors[f"{name}.{moment}"].to(parameter.device) for moment in _MOMENTS
            }
