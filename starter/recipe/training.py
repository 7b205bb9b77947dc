"""The recipe's training loop: runs any stage, and resumes from its last checkpoint to the same result.

Muon trains the matrices, AdamW the embeddings and norms: the fastest combination for these models. Differs from the
usual Muon: orthogonalises all matrices of one shape in a single batch, in fp32.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

logger = logging.getLogger(__name__)

NUM_TAGS = 7
IGNORE = -100
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_EVERY_S = 60.0
NEWTON_SCHULZ_STEPS = ((3.4445, -4.7750, 2.0315),) * 5


@dataclass(frozen=True)
class Row:
    """One training sequence."""

    ids: list[int]
    labels: dict[int, int]
    """Position -> the next token."""
    tags: dict[int, int] = field(default_factory=dict)
    """Position -> fault that begins at this token, for the tagger."""


@dataclass(frozen=True)
class Stage:
    name: str
    num_steps: int
    lr: float
    batch: Callable[[int], Sequence[Row]]
    """Step number -> rows; depends on nothing else, so that a resumed stage sees the same data."""
    tag_weight: float = 1.0


def fit(stage: Stage, model: LlamaForCausalLM, tagger: nn.Linear, *, folder: Path, device: str = "cpu") -> float:
    """Train model and tagger in place; return the seconds spent, including those before a restart.

    `tagger`: auxiliary head on the second-to-last layer that predicts which fault begins at each token.
    """
    learner = nn.ModuleDict({"model": model, "tagger": tagger}).to(device).train()
    optimizers = build_optimizers(learner, lr=stage.lr)
    first, spent = _resume(folder / CHECKPOINT, learner, optimizers)
    start = saved = told = time.monotonic()
    for step in range(first, stage.num_steps):
        for optimizer in optimizers:
            _set_rate(optimizer, step / stage.num_steps)
        loss, tag_loss = _step(model, tagger, optimizers, stage.batch(step), stage.tag_weight)
        now = time.monotonic()
        if now - told > 15 or step + 1 == stage.num_steps:
            rate, place = (step + 1 - first) / (now - start), f"{step + 1}/{stage.num_steps}"
            logger.info("%s %s loss %.4f tags %.4f %.2f/s", stage.name, place, loss, tag_loss, rate)
            told = time.monotonic()
        if now - saved > CHECKPOINT_EVERY_S:
            _save(folder / CHECKPOINT, learner, optimizers, step=step + 1, spent=spent + now - start)
            saved = now
    nn.Module.eval(model)
    return spent + time.monotonic() - start


def collate(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, labels and tags, each (B, T). Causal attention needs no mask for right padding."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    tags = torch.full_like(ids, IGNORE)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, list(row.labels)] = torch.tensor(list(row.labels.values()), dtype=torch.long)
        tags[index, list(row.tags)] = torch.tensor(list(row.tags.values()), dtype=torch.long)
    return ids.to(device), labels.to(device), tags.to(device)


def orthogonalise(update: Tensor) -> Tensor:
    """Newton-Schulz iteration on matrices (n, rows, columns); brings their singular values close to one."""
    tall = update.shape[-2] > update.shape[-1]
    x = update.mT if tall else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.as_tensor(x.mT if tall else x)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for two-dimensional parameters only."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(updates), strict=True):
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        assert parameter.grad is not None
        buffer.lerp_(parameter.grad, 1 - momentum)
        return torch.lerp(parameter.grad, buffer, momentum)


def build_optimizers(learner: nn.Module, *, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW gets `lr`, Muon `5 * lr` because its updates have unit singular values."""
    named = dict(learner.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n}
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return [Muon(matrices.values(), lr=5 * lr), adam]


def _step(
    model: LlamaForCausalLM,
    tagger: nn.Linear,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Sequence[Row],
    tag_weight: float,
) -> tuple[float, float]:
    ids, labels, tags = collate(rows, model.device)
    hidden = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    wanted = labels != IGNORE
    loss = F.cross_entropy(model.lm_head(hidden.last_hidden_state[wanted]), labels[wanted])
    tagged = tags != IGNORE
    tag_loss = torch.zeros(())
    if tag_weight and bool(tagged.any()):
        tag_loss = F.cross_entropy(tagger(hidden.hidden_states[-2][tagged]), tags[tagged])
    torch.autograd.backward(loss + tag_weight * tag_loss)
    nn.utils.clip_grad_norm_([*model.parameters(), *tagger.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach()), float(tag_loss.detach())


def _set_rate(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Short warm-up, constant, then linear decay to a twentieth over the last 60 % of the steps."""
    factor = min(1.0, progress / 0.02 + 0.05, 0.05 + 0.95 * (1 - progress) / 0.6)
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * factor


def _save(
    path: Path, learner: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *, step: int, spent: float
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"learner.{name}": tensor.clone() for name, tensor in learner.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value.clone() for key, value in state.items()}
    written = path.with_suffix(".tmp")
    save_file(tensors, written, metadata={"step": str(step), "spent": f"{spent:.3f}"})
    written.rename(path)


def _resume(path: Path, learner: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[int, float]:
    """The number of steps done and the seconds spent on them."""
    if not path.is_file():
        return 0, 0.0
    with safe_open(path, framework="pt") as file:
        progress = file.metadata()
    tensors = load_file(path)
    own = {name.removeprefix("learner."): tensor for name, tensor in tensors.items() if name.startswith("learner.")}
    learner.load_state_dict(own)
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(progress["step"]), float(progress["spent"])
