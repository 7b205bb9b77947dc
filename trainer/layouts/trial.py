"""Which layout the models are trained in. Called once at the start, on every rank.

    layout = choose_layout([policy, reference], settings.trainer, device=device, compute_dtype=torch.bfloat16)

What the tree would get wrong is refused by name: state or windows across tokens, dropout that can't be switched off.
Then a small random slice goes through both layouts. Models are left with the attention of the layout that is returned.
"""

import logging
from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from shared.errors import SettingsError
from shared.records import Candidate
from shared.settings import TrainerSettings
from trainer.layouts.base import Layout, PassPlan, WindowPairs
from trainer.layouts.flex import Flex
from trainer.layouts.kernels import Dense, Kernel
from trainer.layouts.merged import Merged, is_exact
from trainer.layouts.separate import SeparateLayout
from trainer.layouts.tree import TreeLayout
from trainer.log_probs import SuffixLogProbs
from trainer.preferences import Preference

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Nats a token, mean over a suffix."""
_TF32_TOLERANCE = 5e-3
_MAX_TRUNK_TOKENS = 320
"""Of the slice: starts inside blocks of 128 and beyond the first one."""

_log = logging.getLogger(__name__)


def choose_layout(
    models: Sequence[SuffixLogProbs], settings: TrainerSettings, *, device: torch.device, compute_dtype: torch.dtype
) -> Layout:
    """Raises SettingsError if the tree was asked for by name and does not fit, or the kernel not the device."""
    if settings.layout == "separate":
        return SeparateLayout()
    tree = TreeLayout(choose_kernel(settings, device))
    objection = next(_objections(models, tree, device=device, compute_dtype=compute_dtype), None)
    if objection is None:
        return tree
    if settings.layout == "tree":
        raise SettingsError(f"trainer.layout = 'tree': {objection}; use 'separate' or 'auto'")
    _log.warning("trainer.layout: separate sequences, which cost several times as much: %s", objection)
    return SeparateLayout()


def choose_kernel(settings: TrainerSettings, device: torch.device) -> Kernel:
    name = settings.attention
    if name == "auto":
        name = "flex" if device.type == "cuda" else "merged"
    if name == "dense":
        return Dense()
    if (name == "flex") != (device.type == "cuda"):
        raise SettingsError(f"trainer.attention = '{name}' does not run on {device.type}: use 'auto' or 'dense'")
    if name == "flex":
        return Flex()
    if is_exact():
        return Merged()
    _log.warning("trainer.attention: dense, which is slow: torch %s has no usable flash kernels", torch.__version__)
    return Dense()


def _objections(
    models: Sequence[SuffixLogProbs], tree: TreeLayout, *, device: torch.device, compute_dtype: torch.dtype
) -> Iterator[str]:
    """What speaks against the tree. The attention of models that were tried and failed is put back."""
    for model in models:
        yield from refusals(model.model)
    tolerance = _TOLERANCES[compute_dtype]
    if compute_dtype == torch.float32 and device.type == "cuda":
        tolerance = _TF32_TOLERANCE
    before = [model.model.config._attn_implementation for model in models]
    for model in models:
        objection = _tried(model, tree, device=device, tolerance=tolerance)
        if isinstance(model, FSDPModule):
            model.reshard()  # what is gathered without gradients would get none in the first step
        if objection:
            for each, implementation in zip(models, before, strict=True):
                each.model.set_attn_implementation(implementation)
            yield f"{type(model.model).__name__} {objection}"


def refusals(model: PreTrainedModel) -> Iterator[str]:
    """By name: what the configuration says, whatever the numbers."""
    name, config = type(model).__name__, model.config.get_text_config()
    if getattr(model, "_is_stateful", False):
        yield f"{name} carries a state from token to token"
    types = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if types:
        yield f"{name} has layers of type {', '.join(sorted(types))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        yield f"{name} has a sliding window of {config.sliding_window} tokens"
    if config.is_encoder_decoder or not getattr(model, "_supports_attention_backend", False):
        yield f"{name} does not let its attention be exchanged"


@torch.no_grad()
def _tried(model: SuffixLogProbs, tree: TreeLayout, *, device: torch.device, tolerance: float) -> str | None:
    """What is wrong with the tree for this model; None: nothing, and the model is left with the tree's attention."""
    plan = PassPlan(_slice(model.model))
    one = SeparateLayout().lay_out(plan, device=device)
    separate, again = model(one), model(one)
    if (noise := _difference(separate, again, one.num_targets)) > tolerance:
        return f"has dropout that can't be switched off: equal passes differ by {noise:.2g} nats a token"
    model.model.set_attn_implementation(tree.attention_implementation)
    try:
        found = model(tree.lay_out(plan, device=device))
    except (TypeError, ValueError) as exc:
        return f"can't run the tree's attention: {exc}"
    if (difference := _difference(separate, found, one.num_targets)) <= tolerance:
        return None
    return f"differs in tree and separate sequences by {difference:.2g} nats a token, allowed are {tolerance:.2g}"


def _difference(one: Tensor, other: Tensor, num_targets: Tensor) -> float:
    """The highest over the suffixes (M,); infinite if one is not a number."""
    return float(((one - other).abs() / num_targets).nan_to_num(nan=torch.inf).max())


def _slice(model: PreTrainedModel) -> tuple[WindowPairs, ...]:
    """Two random windows of three chunks: the original chosen, two branches, the original rejected."""
    config, random = model.config.get_text_config(), Random(0)
    step = min(_MAX_TRUNK_TOKENS, getattr(config, "max_position_embeddings", None) or _MAX_TRUNK_TOKENS) // 4

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(random.choices(range(config.vocab_size), k=number))

    windows = []
    for number in range(2):
        trunk = tokens(4 * step)
        original = [trunk[index * step : (index + 1) * step] for index in range(4)]
        pairs = [(original[1], tokens(step)), (tokens(step), tokens(step // 2)), (tokens(step), original[3])]
        windows.append(tuple(_pair(number, trunk, step * (1 + index), *pair) for index, pair in enumerate(pairs)))
    return tuple(windows)


def _pair(
    window: int, trunk: tuple[int, ...], start: int, chosen: tuple[int, ...], rejected: tuple[int, ...]
) -> Preference:
    one, other = (Candidate(kinds=("rollout",), token_ids=ids, text="", weight_version=0) for ids in (chosen, rejected))
    return Preference(f"trial.{window}", trunk, start, one, other)
